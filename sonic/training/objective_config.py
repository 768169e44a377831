"""Every option of what is learnt, one config per objective (stdlib only)."""

from __future__ import annotations

from dataclasses import dataclass

from sonic.config import AdapterConfig, SamplerConfig, one_of, option, require

ATTENTION_SPANS, LEVELS = ("blocks", "clip"), ("clip", "block", "frame")


@dataclass
class ObjectiveConfig:
    """What every objective has: its row in OBJECTIVES."""

    name: str = option("", "one of the files in conf/objective")


@dataclass
class WindowConfig:
    """How the transformer looks at a window of latents."""

    reach: str = option("blocks", "blocks = each sees itself and those before, as in a rollout; clip = full attention")
    levels: str = option("clip", "what has a noise level of its own: clip, block or frame")
    max_first_block: int = option(60, "the window begins at most so many blocks into the video")
    past: int = option(0, "latent frames at the window's front that are given as motion memory")
    past_noise: float = option(0.0, "most noise on them, as a sigma")

    def __post_init__(self) -> None:
        one_of(self.reach, ATTENTION_SPANS, "objective.window.reach")
        one_of(self.levels, LEVELS, "objective.window.levels")
        require(self.max_first_block >= 0, f"objective.window.max_first_block={self.max_first_block}: need 0 or more")
        require(self.past >= 0, f"objective.window.past={self.past}: need 0 or more latent frames")
        require(0 <= self.past_noise <= 1, f"objective.window.past_noise={self.past_noise}: need a sigma in [0, 1]")


@dataclass
class ErrorConfig:
    """What an error on latents costs."""

    weight_cap: float = option(4.0, "ceiling of 1/sigma² in an error on the clean latents")
    cell_gain: float = option(8.0, "weight of the liveliest cell is 1 + cell_gain, of a dead one 1")
    change_weight: float = option(0.5, "weight of the error in the change from one latent frame to the next")


@dataclass
class FlowMatchConfig(ObjectiveConfig):
    """Diffusion forcing of the DiT on latents."""

    name: str = option("flow_match", "one of the files in conf/objective")
    schedule_share: float = option(0.5, "clips whose sigma comes from `schedule`; the others are uniform in (0, 1]")
    schedule: list[float] = option([1.0, 0.9, 0.75, 0.5], "sigmas that count more")
    audio_dropout: float = option(0.1, "clips without audio, for guidance")
    viseme_weight: float = option(0.3, "weight of naming the visemes; 0 where clips have none")
    window: WindowConfig = option(WindowConfig)
    error: ErrorConfig = option(ErrorConfig)
    learn: AdapterConfig = option(AdapterConfig)

    def __post_init__(self) -> None:
        require(all(0 < s <= 1 for s in self.schedule), f"objective.schedule={self.schedule}: need sigmas in (0, 1]")


@dataclass
class DistillConfig(ObjectiveConfig):
    """What all ways to fewer steps have in common. The teacher is the model with its weights as they are."""

    sampler: SamplerConfig = option(SamplerConfig)
    teacher_guide_scale: float = option(1.0, "guidance of the teacher towards the audio, which the student learns to do without")
    window: WindowConfig = option(WindowConfig)
    error: ErrorConfig = option(ErrorConfig)
    learn: AdapterConfig = option(AdapterConfig)

    def __post_init__(self) -> None:
        name, scale = self.sampler.name, self.sampler.sample_guide_scale
        require(name == "euler", f"objective.sampler.name={name}: a student walks in straight steps; use euler")
        require(scale == 1, f"objective.sampler.sample_guide_scale={scale}: students need no guidance; set objective.teacher_guide_scale")
        one_of(self.window.levels, ("clip",), "objective.window.levels")
        require(self.window.past == 0, f"objective.window.past={self.window.past}: a rollout's past is its ring; use 0")


@dataclass
class ConsistencyConfig(DistillConfig):
    """From anywhere on the teacher's path, one step to the end of the student's step."""

    name: str = option("consistency", "one of the files in conf/objective")
    teacher_steps: int = option(40, "steps of the teacher on the whole way from noise")
    leap: int = option(1, "teacher's steps before the student's own word is taken; teacher_steps = never taken")
    start_share: float = option(0.5, "clips that begin where a step of the student begins")

    def __post_init__(self) -> None:
        super().__post_init__()
        steps, leap = self.teacher_steps, self.leap
        require(steps >= self.sampler.sample_steps, f"objective.teacher_steps={steps}: the student takes {self.sampler.sample_steps}")
        require(1 <= leap <= steps, f"objective.leap={leap}: need 1 to teacher_steps={steps}")
        require(0 <= self.start_share <= 1, f"objective.start_share={self.start_share}: need a share between 0 and 1")


@dataclass
class DmdConfig(DistillConfig):
    """Videos of the student are led from where a critic says they lie to where the teacher says videos lie."""

    name: str = option("dmd", "one of the files in conf/objective")
    critic_turns: int = option(5, "updates of the critic before each of the student")
    critic_rate: float = option(0.2, "learning rate of the critic as a share of optim.lr")
    anchor_share: float = option(0.3, "rollouts whose first block is the truth, against videos that freeze")
    lowest: float = option(0.02, "least sigma at which teacher and critic are asked")
    highest: float = option(0.98, "greatest sigma at which they are asked")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.critic_turns >= 1, f"objective.critic_turns={self.critic_turns}: need at least 1")
        require(self.critic_rate > 0, f"objective.critic_rate={self.critic_rate}: need a positive share")
        require(0 <= self.anchor_share <= 1, f"objective.anchor_share={self.anchor_share}: need a share between 0 and 1")
        low, high = self.lowest, self.highest
        require(0 < low < high <= 1, f"objective.lowest={low} and objective.highest={high}: need 0 < lowest < highest ≤ 1")


@dataclass
class VisemeConfig(ObjectiveConfig):
    """Training of the speech encoder: name the mouth shapes from the sound."""

    name: str = option("viseme", "one of the files in conf/objective")
    audio_noise: float = option(0.1, "noise on the log-mel columns, in their standard deviations")
    tilt: float = option(0.2, "spectral tilt, in the same unit at both ends of the mel axis")
    throat: float = option(0.25, "largest change of the vocal tract length, in log")
    bend: float = option(0.4, "the same of the lowest formants alone, as mouths of other shapes have them")


@dataclass
class AutoencodeConfig(ObjectiveConfig):
    """The preview's motion autoencoder, on drawn people."""

    name: str = option("autoencode", "one of the files in conf/objective")
    latent_noise: float = option(0.4, "most noise on a latent, in the latents' own size")
    focus: float = option(6.0, "how much more the mouth counts than the rest")


@dataclass
class PortraitConfig(ObjectiveConfig):
    """Latents of a portrait that tell what its mouth will do."""

    name: str = option("portrait", "one of the files in conf/objective")
    focus: float = option(6.0, "how much more the mouth counts than the rest")


OBJECTIVE_CONFIGS = {
    "flow_match": FlowMatchConfig,
    "consistency": ConsistencyConfig,
    "dmd": DmdConfig,
    "viseme": VisemeConfig,
    "autoencode": AutoencodeConfig,
    "portrait": PortraitConfig,
}
