"""Every knob of a training run (stdlib only, so that `--help` needs no torch). What to learn is an objective's own config."""

from __future__ import annotations

from dataclasses import dataclass, field

from sonic.config import DecodeConfig, ModelConfig, RunConfig, SamplerConfig, VideoConfig, knob


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


@dataclass
class BudgetConfig:
    """How long to train: exactly one of `max_steps` and `max_minutes`. The schedule runs over the fraction that is used."""

    max_steps: int = 0
    max_minutes: float = 0.0
    batch_size: int = 8
    accumulate: int = 1

    def __post_init__(self) -> None:
        _require(self.batch_size >= 1, f"budget.batch_size={self.batch_size}: need at least 1")
        _require(self.accumulate >= 1, f"budget.accumulate={self.accumulate}: need at least 1")


@dataclass
class OptimConfig:
    """AdamW with linear warm-up, a flat part, and a cosine fall that starts at `decay_from` of the budget."""

    lr: float = 1e-3
    final_lr: float = 0.02  # share of lr at the end of the budget
    warmup_steps: int = 100
    decay_from: float = 0.3  # fraction of the budget
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    ema_decay: float = 0.999

    def __post_init__(self) -> None:
        _require(self.lr > 0, f"optim.lr={self.lr}: need a positive learning rate")
        _require(0 <= self.decay_from < 1, f"optim.decay_from={self.decay_from}: need a fraction in [0, 1)")
        _require(0 <= self.ema_decay < 1, f"optim.ema_decay={self.ema_decay}: need a value in [0, 1)")


@dataclass
class SpeedConfig:
    """Where and how fast. `threads=0` leaves torch's own choice."""

    device: str = "auto"
    threads: int = 0
    precision: str = "float32"  # or bfloat16: autocast around the loss
    channels_last: bool = False
    workers: int = 0  # processes that read or draw batches
    prefetch: int = 4  # batches each of them keeps ready

    def __post_init__(self) -> None:
        _require(
            self.precision in ("float32", "bfloat16"),
            f"speed.precision={self.precision} is unknown; choose one of: float32, bfloat16",
        )


@dataclass
class CheckpointConfig:
    """How often the whole state is kept. `resume` is auto (newest good one), never, or a checkpoint's path."""

    every_minutes: float = 5.0
    every_steps: int = 0  # 0 = by minutes only
    keep: int = 2
    resume: str = "auto"

    def __post_init__(self) -> None:
        _require(self.keep >= 1, f"checkpoint.keep={self.keep}: need at least 1")


@dataclass
class LogConfig:
    """Where the figures go: always JSONL in the run folder, to W&B when asked (key from the environment)."""

    every_steps: int = 20
    wandb: str = "off"
    project: str = "sonic"
    bar: bool = True

    def __post_init__(self) -> None:
        _require(self.wandb in ("off", "offline", "online"), f"log.wandb={self.wandb} is unknown; choose one of: off, offline, online")
        _require(self.every_steps >= 1, f"log.every_steps={self.every_steps}: need at least 1")


@dataclass
class DataConfig:
    """What a batch is cut from. `source` names a row of DATASETS; `window` is in latent frames (0 = whole clips)."""

    source: str = "clips"
    folder: str = ""
    window: int = 9
    split: str = "train"
    resolution: int = 192


@dataclass
class ObjectiveConfig:
    """What every objective has: its row in OBJECTIVES."""

    name: str = ""


@dataclass
class FlowMatchConfig(ObjectiveConfig):
    """Block-causal diffusion forcing of the DiT on latents."""

    name: str = "flow_match"
    schedule_share: float = 0.5  # clips whose sigma comes from `schedule`; the others are uniform in (0, 1]
    schedule: list[float] = field(default_factory=lambda: [1.0, 0.9, 0.75, 0.5])
    weight_cap: float = 4.0  # ceiling of 1/sigma² in the loss on the clean latents
    cell_gain: float = 8.0  # weight of the liveliest cell is 1 + cell_gain, of a dead one 1
    change_weight: float = 0.5  # weight of the error in the change from one latent frame to the next
    audio_dropout: float = 0.1
    max_first_block: int = 60
    viseme_weight: float = 0.3

    def __post_init__(self) -> None:
        _require(all(0 < s <= 1 for s in self.schedule), f"objective.schedule={self.schedule}: need sigmas in (0, 1]")


@dataclass
class VisemeConfig(ObjectiveConfig):
    """Training of the speech encoder: name the mouth shapes from the sound."""

    name: str = "viseme"
    audio_noise: float = 0.1  # noise on the log-mel columns, in their standard deviations
    tilt: float = 0.2  # spectral tilt, in the same unit at both ends of the mel axis
    throat: float = 0.12  # largest change of the vocal tract length, in log


@dataclass
class AutoencodeConfig(ObjectiveConfig):
    """The preview's motion autoencoder, on drawn people."""

    name: str = "autoencode"
    latent_noise: float = 0.4  # most noise on a latent, in the latents' own size
    focus: float = 6.0  # how much more the mouth counts than the rest


@dataclass
class PortraitConfig(ObjectiveConfig):
    """Latents of a portrait that tell what its mouth will do."""

    name: str = "portrait"
    focus: float = 6.0  # how much more the mouth counts than the rest


OBJECTIVE_CONFIGS = {
    "flow_match": FlowMatchConfig,
    "viseme": VisemeConfig,
    "autoencode": AutoencodeConfig,
    "portrait": PortraitConfig,
}


@dataclass
class TrainConfig:
    """One training run, whole. It lives in the folder runs/`name`."""

    name: str = "train"
    seed: int = 0
    export: str = ""  # where the averaged weights go, .safetensors
    init_from: str = ""  # weights to start from; names that are absent there keep their own start
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: DataConfig = field(default_factory=DataConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        steps, minutes = self.budget.max_steps, self.budget.max_minutes
        _require(
            (steps > 0) != (minutes > 0),
            f"budget.max_steps={steps} and budget.max_minutes={minutes}: set exactly one of them above zero",
        )


@dataclass
class EvalConfig:
    """What is scored: people, voices and sentences of the test split, with a still head."""

    clips: int = knob(20, "people, each with a recording of their own")
    seed: int = knob(0, "other seeds are other people and sentences")
    seconds: float = knob(8.0, "length of each recording, at least 2")
    noisy: bool = knob(False, "dirt of real recordings on the speech")
    videos: str = knob("", "folder for a contact sheet of every clip; empty = none")

    def __post_init__(self) -> None:
        _require(self.clips >= 1, f"eval.clips={self.clips}: need at least 1")
        _require(self.seconds >= 2, f"eval.seconds={self.seconds}: a correlation needs at least 2 seconds")


@dataclass
class EvaluateConfig:
    """Scores a model on drawn people whose mouths are known exactly: the model, the true video, and nothing moving."""

    json: str = knob("", "where the figures go")
    eval: EvalConfig = knob(EvalConfig)
    run: RunConfig = knob(RunConfig)
    model: ModelConfig = knob(ModelConfig)
    sampler: SamplerConfig = knob(SamplerConfig)
    video: VideoConfig = knob(VideoConfig)
    decode: DecodeConfig = knob(DecodeConfig)
