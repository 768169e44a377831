"""Options of the training objectives, one config each (stdlib only)."""

from __future__ import annotations

from dataclasses import dataclass

from sonic.config import AdapterConfig, SamplerConfig, one_of, option, require
from sonic.registry import Registry, names_in

OBJECTIVE_TABLE = "training.objective_config.OBJECTIVE_CONFIGS"
ATTENTION_SPANS, LEVELS, KERNELS = ("blocks", "clip"), ("clip", "block", "frame"), ("sdpa", "flex")
NOISE_TABLE = "training.objectives.svd_audio.NOISE"


@dataclass
class ObjectiveConfig:
    """Base of all objectives' options; the default of `name` is the objective's name."""

    name: str = option("", "what is trained, and how", table=OBJECTIVE_TABLE)


@dataclass
class WindowConfig:
    """The window of latents that the transformer is trained on."""

    reach: str = option("blocks", "blocks = each block attends to itself and earlier ones, as in a rollout; clip = full attention")
    levels: str = option("clip", "unit with its own noise level: clip, block or frame")
    max_first_block: int = option(60, "largest position of the window in the video, in blocks")
    past: int = option(0, "latent frames at the start of the window that are given as motion memory")
    past_noise: float = option(0.0, "largest noise level (sigma) of the motion memory")
    attention: str = option(
        "sdpa", "under reach=blocks: sdpa = an attention per block; flex = one for all, compiled, with gradients on CUDA"
    )

    def __post_init__(self) -> None:
        one_of(self.reach, ATTENTION_SPANS, "objective.window.reach")
        one_of(self.levels, LEVELS, "objective.window.levels")
        one_of(self.attention, KERNELS, "objective.window.attention")
        fits = self.attention == "sdpa" or self.reach == "blocks"
        require(fits, f"objective.window.attention={self.attention} is for objective.window.reach=blocks; under {self.reach} leave it out")
        require(self.max_first_block >= 0, f"objective.window.max_first_block={self.max_first_block}: need 0 or more")
        require(self.past >= 0, f"objective.window.past={self.past}: need 0 or more latent frames")
        require(0 <= self.past_noise <= 1, f"objective.window.past_noise={self.past_noise}: need a sigma in [0, 1]")


@dataclass
class ErrorConfig:
    """Weights of the error on latents."""

    weight_cap: float = option(4.0, "ceiling of 1/sigma² in an error on the clean latents")
    cell_gain: float = option(8.0, "a latent cell has weight 1 + cell_gain if it moves most, 1 if it never moves")
    change_weight: float = option(0.5, "weight of the error in the change from one latent frame to the next")


@dataclass
class FlowMatchConfig(ObjectiveConfig):
    """Trains the DiT by diffusion forcing on latents."""

    name: str = option("flow_match", "what is trained, and how", table=OBJECTIVE_TABLE)
    schedule_share: float = option(0.5, "share of clips whose sigma is one of `schedule`; others are uniform in (0, 1]")
    schedule: list[float] = option([1.0, 0.9, 0.75, 0.5], "sigmas that are drawn more often")
    audio_dropout: float = option(0.1, "share of clips trained without audio, for classifier-free guidance")
    viseme_weight: float = option(0.3, "weight of the viseme loss; 0 for clips without visemes")
    window: WindowConfig = option(WindowConfig)
    error: ErrorConfig = option(ErrorConfig)
    learn: AdapterConfig = option(AdapterConfig)

    def __post_init__(self) -> None:
        require(all(0 < s <= 1 for s in self.schedule), f"objective.schedule={self.schedule}: need sigmas in (0, 1]")


@dataclass
class DistillConfig(ObjectiveConfig):
    """Options common to the distillation objectives. The teacher is the model with its initial weights."""

    sampler: SamplerConfig = option(SamplerConfig)
    teacher_guide_scale: float = option(1.0, "audio guidance scale of the teacher; the student learns to need none")
    window: WindowConfig = option(WindowConfig)
    error: ErrorConfig = option(ErrorConfig)
    learn: AdapterConfig = option(AdapterConfig)

    def __post_init__(self) -> None:
        name, scale = self.sampler.name, self.sampler.sample_guide_scale
        require(name == "euler", f"objective.sampler.name={name}: students sample with Euler steps; use euler")
        require(scale == 1, f"objective.sampler.sample_guide_scale={scale}: students need no guidance; set objective.teacher_guide_scale")
        one_of(self.window.levels, ("clip",), "objective.window.levels")
        require(self.window.past == 0, f"objective.window.past={self.window.past}: distillation has no motion memory in the window; use 0")


@dataclass
class ConsistencyConfig(DistillConfig):
    """Trains the student to go, in one step, from any point of the teacher's path to the end of its sampling step."""

    name: str = option("consistency", "what is trained, and how", table=OBJECTIVE_TABLE)
    teacher_steps: int = option(40, "sampling steps of the teacher from noise to clean latents")
    leap: int = option(1, "teacher steps to the target, the student does the rest; teacher_steps = teacher only")
    start_share: float = option(0.5, "share of clips that start at the beginning of a student's step")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_steps(self)


def _check_steps(config: ConsistencyConfig | SvdConsistencyConfig) -> None:
    """Raise ValueError unless the steps of a consistency distillation fit each other."""
    steps, leap, share = config.teacher_steps, config.leap, config.start_share
    require(steps >= config.sampler.sample_steps, f"objective.teacher_steps={steps}: the student takes {config.sampler.sample_steps}")
    require(1 <= leap <= steps, f"objective.leap={leap}: need 1 to teacher_steps={steps}")
    require(0 <= share <= 1, f"objective.start_share={share}: need a share between 0 and 1")


@dataclass
class DmdConfig(DistillConfig):
    """Trains the student so that its videos, as a critic models them, match the distribution of the teacher's."""

    name: str = option("dmd", "what is trained, and how", table=OBJECTIVE_TABLE)
    critic_turns: int = option(5, "updates of the critic before each update of the student")
    critic_rate: float = option(0.2, "learning rate of the critic as a share of optim.lr")
    anchor_share: float = option(0.3, "share of rollouts that start with a true block, which keeps videos from freezing")
    lowest: float = option(0.02, "least sigma at which teacher and critic are compared")
    highest: float = option(0.98, "greatest sigma at which teacher and critic are compared")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.critic_turns >= 1, f"objective.critic_turns={self.critic_turns}: need at least 1")
        require(self.critic_rate > 0, f"objective.critic_rate={self.critic_rate}: need a positive share")
        require(0 <= self.anchor_share <= 1, f"objective.anchor_share={self.anchor_share}: need a share between 0 and 1")
        low, high = self.lowest, self.highest
        require(0 < low < high <= 1, f"objective.lowest={low} and objective.highest={high}: need 0 < lowest < highest ≤ 1")


@dataclass
class VisemeConfig(ObjectiveConfig):
    """Trains the speech encoder to predict visemes from log-mel columns."""

    name: str = option("viseme", "what is trained, and how", table=OBJECTIVE_TABLE)
    audio_noise: float = option(0.1, "noise on the log-mel columns, in their standard deviations")
    tilt: float = option(0.2, "spectral tilt, in the same unit at both ends of the mel axis")
    throat: float = option(0.25, "largest change of the vocal tract length, in log")
    bend: float = option(0.4, "the same of the lowest formants alone, as mouths of other shapes have them")
    head_only: bool = option(False, "train and export the linear viseme head alone, over the encoder that the model has")


@dataclass
class AutoencodeConfig(ObjectiveConfig):
    """Trains the preview's motion autoencoder on drawn people."""

    name: str = option("autoencode", "what is trained, and how", table=OBJECTIVE_TABLE)
    latent_noise: float = option(0.4, "most noise on a latent, in the latents' own size")
    decoder_only: bool = option(False, "keep the encoders of init_from, so that a transformer trained on their latents goes on fitting")
    focus: float = option(6.0, "how much more the mouth counts than the rest")


@dataclass
class PortraitConfig(ObjectiveConfig):
    """Trains the portrait encoder: latents from which the motion latents of given visemes can be predicted."""

    name: str = option("portrait", "what is trained, and how", table=OBJECTIVE_TABLE)
    focus: float = option(6.0, "how much more the mouth counts than the rest")


@dataclass
class SvdAudioConfig(ObjectiveConfig):
    """Trains the audio adapters of a UNet that denoises windows, and the networks that make its audio tokens and motion buckets."""

    name: str = option("svd_audio", "what is trained, and how", table=OBJECTIVE_TABLE)
    noise: str = option(
        "karras", "noise levels: karras = evenly along the levels of sampling, lognormal = as SVD was trained", table=NOISE_TABLE
    )
    drop_image: float = option(0.05, "share of clips trained without the picture (embedding and latents), for guidance")
    drop_audio: float = option(0.05, "share of clips trained without audio, for guidance")
    drop_both: float = option(0.05, "share of clips trained without either, for guidance")
    bucket_weight: float = option(0.1, "weight of the error of the motion buckets that are predicted from the sound")
    learn: AdapterConfig = option(AdapterConfig)

    def __post_init__(self) -> None:
        one_of(self.noise, names_in(NOISE_TABLE), "objective.noise")
        shares = [self.drop_image, self.drop_audio, self.drop_both]
        fits = min(shares) >= 0 and sum(shares) <= 1
        require(fits, f"objective.drop_image, drop_audio, drop_both={shares}: need shares of 0 or more, together at most 1")
        require(self.bucket_weight >= 0, f"objective.bucket_weight={self.bucket_weight}: need 0 or more")
        require(not self.learn.rank, f"objective.learn.rank={self.learn.rank}: svd_audio trains whole weights of learn.targets; use 0")


@dataclass
class SvdConsistencyConfig(ObjectiveConfig):
    """Trains a student of a UNet that denoises windows to go, in one step, from any point of the teacher's path to the end of its step."""

    name: str = option("svd_consistency", "what is trained, and how", table=OBJECTIVE_TABLE)
    sample_steps: int = option(8, "sampling steps of the student")
    teacher_steps: int = option(24, "sampling steps of the teacher from noise to clean latents")
    teacher_guide_scale: float = option(2.0, "guidance of the teacher towards the picture; the student learns to need none")
    teacher_audio_guide_scale: float = option(7.5, "guidance of the teacher towards the audio; the student learns to need none")
    leap: int = option(1, "teacher steps to the target, the student does the rest; teacher_steps = teacher only")
    start_share: float = option(0.5, "share of clips that start at the beginning of a student's step")
    learn: AdapterConfig = option(AdapterConfig)

    def __post_init__(self) -> None:
        _check_steps(self)

    @property
    def sampler(self) -> SamplerConfig:
        """How the student samples: at the Karras levels, without guidance."""
        return SamplerConfig(name="euler", schedule="karras", sample_steps=self.sample_steps)


_ALL = (FlowMatchConfig, ConsistencyConfig, DmdConfig, VisemeConfig, AutoencodeConfig, PortraitConfig, SvdAudioConfig, SvdConsistencyConfig)
OBJECTIVE_CONFIGS: Registry[type[ObjectiveConfig]] = Registry("objective", {config.name: config for config in _ALL})
