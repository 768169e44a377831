"""Options of training and evaluation runs (stdlib only, so that `--help` needs no torch). Objectives have configs of their own."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from sonic.config import (
    OWN,
    PRECISIONS,
    DecodeConfig,
    ModelConfig,
    RunConfig,
    SamplerConfig,
    VideoConfig,
    one_of,
    option,
    precision_of,
    require,
)
from sonic.parallel.parallel_config import ParallelConfig
from sonic.training.objective_config import ObjectiveConfig

ENGINE_NAMES = ("local", "fsdp", "zero2", "zero3")


@dataclass
class BudgetConfig:
    """How long to train: exactly one of `max_steps` and `max_minutes`. The learning rate follows the used share of the budget.

    A step uses `accumulate` batches of `batch_size` samples, over all processes together.
    """

    max_steps: int = 0
    max_minutes: float = 0.0
    batch_size: int = 8
    accumulate: int = 1  # batches to a step; a multiple of the number of processes, which share them

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, f"budget.batch_size={self.batch_size}: need at least 1")
        require(self.accumulate >= 1, f"budget.accumulate={self.accumulate}: need at least 1")


@dataclass
class OptimConfig:
    """AdamW; learning rate with linear warm-up, a constant part, and cosine decay from `decay_from` of the budget."""

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
        require(self.lr > 0, f"optim.lr={self.lr}: need a positive learning rate")
        require(0 <= self.decay_from < 1, f"optim.decay_from={self.decay_from}: need a fraction in [0, 1)")
        require(0 <= self.ema_decay < 1, f"optim.ema_decay={self.ema_decay}: need a value in [0, 1)")


@dataclass
class SpeedConfig:
    """Device, precision, data loading and parallelism. `threads=0` leaves the number to torch."""

    device: str = "auto"
    threads: int = 0
    precision: str = OWN  # float32, bfloat16 (autocast around the loss), or auto = the model's own
    channels_last: bool = False
    workers: int = 0  # processes that read or draw batches
    prefetch: int = 4  # batches each of them keeps ready
    engine: str = "auto"  # auto (local alone, fsdp among several), local, fsdp (torch FSDP2), zero2 or zero3 (DeepSpeed)
    recompute: bool = False  # layers are computed again for the gradient instead of remembered
    cpu_offload: bool = False  # shards lie in host memory
    context: int = 1  # processes that share the tokens of each batch (fsdp)
    timeout_s: float = 45.0  # without a sign that a process gets on, after which it is lost and all end

    def __post_init__(self) -> None:
        one_of(self.engine, ("auto", *ENGINE_NAMES), "speed.engine")
        one_of(self.device.split(":")[0], ("auto", "cpu", "cuda"), "speed.device")
        require(0 <= self.threads <= 4096, f"speed.threads={self.threads}: need 0 (torch's own choice) to 4096")
        require(self.workers >= 0, f"speed.workers={self.workers}: need 0 (the training's own process) or more")
        require(self.prefetch >= 1, f"speed.prefetch={self.prefetch}: need at least 1")
        require(1 <= self.timeout_s <= 3600, f"speed.timeout_s={self.timeout_s} must lie between 1 and 3600")
        require(self.context >= 1, f"speed.context={self.context}: need at least 1")
        one_of(self.precision, (OWN, *PRECISIONS), "speed.precision")


@dataclass
class CheckpointConfig:
    """How often the state is saved. `resume` is auto (newest good one), never, or a checkpoint's path; newer ones are then renamed."""

    every_minutes: float = 5.0
    every_steps: int = 0  # 0 = by minutes only
    keep: int = 2
    resume: str = "auto"

    def __post_init__(self) -> None:
        require(self.keep >= 1, f"checkpoint.keep={self.keep}: need at least 1")


@dataclass
class LogConfig:
    """Where metrics are logged: always JSONL in the run folder, optionally W&B (key from the environment)."""

    every_steps: int = 20
    wandb: str = "off"
    project: str = "sonic"
    bar: bool = True
    samples_every: int = 0  # steps between sample videos, the last step's besides; 0 = none
    sample_seconds: float = 3.0
    sample_steps: int = 8  # sampling steps of a student that has not learnt how many

    def __post_init__(self) -> None:
        every = self.every_steps
        fits = self.samples_every >= 0 and self.samples_every % max(1, every) == 0
        require(fits, f"log.samples_every={self.samples_every} must be a multiple of log.every_steps={every}, or 0 for none")
        require(2 <= self.sample_seconds <= 60, f"log.sample_seconds={self.sample_seconds}: need 2 to 60 seconds")
        require(self.sample_steps >= 1, f"log.sample_steps={self.sample_steps}: need at least 1")
        require(self.wandb in ("off", "offline", "online"), f"log.wandb={self.wandb} is unknown; choose one of: off, offline, online")
        require(self.every_steps >= 1, f"log.every_steps={self.every_steps}: need at least 1")


@dataclass
class DataConfig:
    """The training data. `source` names a row of DATASETS; `window` is in latent frames (0 = whole clips)."""

    source: str = "clips"
    folder: str = ""
    window: int = 9
    split: str = "train"
    resolution: int = 192


@dataclass
class TrainConfig:
    """All options of one training run, whose folder is runs/`name`."""

    name: str = "train"
    seed: int = 0
    export: str = ""  # where the averaged weights go, .safetensors
    init_from: str = ""  # weights to start from, bundled:preview_dit or a path; names that are absent there keep their own start
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
        require(
            (steps > 0) != (minutes > 0),
            f"budget.max_steps={steps} and budget.max_minutes={minutes}: set exactly one of them above zero",
        )
        self.speed = replace(self.speed, precision=precision_of(self.speed.precision, self.model))


@dataclass
class EvalConfig:
    """The evaluation set: people, voices and sentences of the test split, without head motion."""

    clips: int = option(20, "drawn people, each with its own recording")
    seed: int = option(0, "seed of the people and sentences")
    seconds: float = option(8.0, "length of each recording, at least 2")
    noisy: bool = option(False, "add noise, echo and band limits of real recordings to the speech")
    videos: str = option("", "folder for a contact sheet of every clip; empty = none")
    num_videos: int = option(0, "clips whose videos are saved too, in the same folder")

    def __post_init__(self) -> None:
        require(self.clips >= 1, f"eval.clips={self.clips}: need at least 1")
        require(self.seconds >= 2, f"eval.seconds={self.seconds}: a correlation needs at least 2 seconds")


@dataclass
class EvaluateConfig:
    """Scores a model on drawn people with exactly known mouths, beside the true video and a still one."""

    json: str = option("", "JSON file for the figures")
    eval: EvalConfig = option(EvalConfig)
    run: RunConfig = option(RunConfig)
    model: ModelConfig = option(ModelConfig)
    sampler: SamplerConfig = option(SamplerConfig)
    video: VideoConfig = option(VideoConfig)
    decode: DecodeConfig = option(DecodeConfig)
    parallel: ParallelConfig = option(ParallelConfig)
