"""Options of a training (stdlib only, so that `--help` needs no torch). Objectives have configs of their own."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from sonic.config import OWN, PRECISIONS, CommandConfig, ModelConfig, precision_of
from sonic.registry import names_in, one_of, option, require
from sonic.training.idle_options import refuse_idle_options
from sonic.training.objective_config import ObjectiveConfig

ENGINE_TABLE, DATASET_TABLE = "training.build.ENGINES", "training.build.DATASETS"


@dataclass
class BudgetConfig:
    """How long to train: exactly one of `max_steps` and `max_minutes`. The learning rate follows the used share of the budget.

    A step uses `accumulate` batches of `batch_size` samples, over all processes together.
    """

    max_steps: int = option(0, "optimizer steps; 0 = max_minutes counts")
    max_minutes: float = option(0.0, "minutes of training; 0 = max_steps counts")
    batch_size: int = option(8, "samples in a batch")
    accumulate: int = option(1, "batches to a step, shared by all processes: a multiple of their number")

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, f"budget.batch_size={self.batch_size}: need at least 1")
        require(self.accumulate >= 1, f"budget.accumulate={self.accumulate}: need at least 1")


@dataclass
class OptimConfig:
    """AdamW; learning rate with linear warm-up, a constant part, and cosine decay from `decay_from` of the budget."""

    lr: float = option(1e-3, "learning rate after the warm-up")
    final_lr: float = option(0.02, "share of lr at the end of the budget")
    warmup_steps: int = option(100, "steps in which the rate rises linearly from 0")
    decay_from: float = option(0.3, "fraction of the budget from which the rate falls along a cosine")
    beta1: float = option(0.9, "AdamW's decay of the mean gradient")
    beta2: float = option(0.95, "AdamW's decay of the mean squared gradient")
    weight_decay: float = option(0.01, "AdamW's decoupled weight decay")
    clip_norm: float = option(1.0, "largest norm of the gradient of a role; larger ones are scaled down")
    ema_decay: float = option(0.999, "decay of the running average that is exported, per step")

    def __post_init__(self) -> None:
        require(self.lr > 0, f"optim.lr={self.lr}: need a positive learning rate")
        require(0 <= self.decay_from < 1, f"optim.decay_from={self.decay_from}: need a fraction in [0, 1)")
        require(0 <= self.ema_decay < 1, f"optim.ema_decay={self.ema_decay}: need a value in [0, 1)")


@dataclass
class DivisionConfig:
    """How several processes divide the weights, their copies and the tokens of a training."""

    engine: str = option("auto", "auto = local alone, fsdp (FSDP2) among several; zero2 and zero3 are DeepSpeed's", table=ENGINE_TABLE)
    context: int = option(1, "processes that share the tokens of each batch (fsdp)")
    replicas: int = option(1, "groups of processes that hold all weights each (fsdp): HSDP; the number of nodes gathers inside nodes only")
    reshard: bool = option(True, "fsdp frees a unit's gathered weights after use; false keeps them from a forward to its backward pass")
    cpu_offload: bool = option(False, "shards are kept in host memory")

    def __post_init__(self) -> None:
        one_of(self.engine, ("auto", *names_in(ENGINE_TABLE)), "speed.engine")
        for degree in ("context", "replicas"):
            require(getattr(self, degree) >= 1, f"speed.{degree}={getattr(self, degree)}: need at least 1")


@dataclass
class SpeedConfig(DivisionConfig):
    """Device, precision, data loading and parallelism. `threads=0` leaves the number to torch."""

    device: str = option("auto", "auto, cpu or cuda; auto takes cuda when there is one")
    threads: int = option(0, "CPU threads; 0 leaves it to torch")
    precision: str = option(OWN, "float32, bfloat16 (autocast around the loss), or auto = the model's own")
    channels_last: bool = option(False, "convolutions in channels-last memory format")
    workers: int = option(0, "processes that read or draw batches; 0 = the training's own")
    prefetch: int = option(4, "batches that each of them keeps ready")
    recompute: bool = option(False, "blocks are computed again for the gradient instead of kept")
    timeout_s: float = option(45.0, "seconds without progress of a process, after which it counts as lost and all end")

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.device.split(":")[0], ("auto", "cpu", "cuda"), "speed.device")
        require(0 <= self.threads <= 4096, f"speed.threads={self.threads}: need 0 (torch's own choice) to 4096")
        require(self.workers >= 0, f"speed.workers={self.workers}: need 0 (the training's own process) or more")
        require(self.prefetch >= 1, f"speed.prefetch={self.prefetch}: need at least 1")
        require(1 <= self.timeout_s <= 3600, f"speed.timeout_s={self.timeout_s} must lie between 1 and 3600")
        one_of(self.precision, (OWN, *PRECISIONS), "speed.precision")


@dataclass
class CheckpointConfig:
    """How often the state is saved. `resume` is auto (newest good one), never, or a checkpoint's path; newer ones are then renamed."""

    every_minutes: float = option(5.0, "minutes between checkpoints")
    every_steps: int = option(0, "steps between checkpoints; 0 = by minutes only")
    keep: int = option(2, "newest checkpoints that are kept")
    resume: str = option("auto", "auto (newest good one), never, or the path of a checkpoint; newer ones are then renamed")

    def __post_init__(self) -> None:
        require(self.keep >= 1, f"checkpoint.keep={self.keep}: need at least 1")


@dataclass
class WandbConfig:
    """What W&B gets of a run (its key comes from the environment)."""

    wandb: str = option("off", "off, offline or online; the key comes from the environment")
    project: str = option("sonic", "W&B project")
    entity: str = option("", "W&B user or team; empty = the account's own")
    group: str = option("", "W&B group of runs that belong together")
    job_type: str = option("", "W&B job type; empty = the command: train, evaluate or judge")
    tags: list[str] = option([], "W&B tags, [a,b]")
    notes: str = option("", "a sentence about the run, for W&B")
    artifacts: str = option("small", "small (figures, card, sheets, videos) or weights (exported weights are uploaded too)")

    def __post_init__(self) -> None:
        one_of(self.wandb, ("off", "offline", "online"), "log.wandb")
        one_of(self.artifacts, ("small", "weights"), "log.artifacts")
        require(self.artifacts == "small" or self.wandb != "off", "log.artifacts=weights uploads nothing with log.wandb=off; use online")


@dataclass
class LogConfig(WandbConfig):
    """Where metrics are logged: always JSONL in the run folder, optionally W&B and TensorBoard."""

    every_steps: int = option(20, "steps between lines of figures")
    tensorboard: bool = option(False, "write TensorBoard's files into the run folder too")
    histograms_every: int = option(0, "steps between histograms of gradients and weights, for W&B and TensorBoard; 0 = none")
    bar: bool = option(True, "show a progress bar")
    samples_every: int = option(0, "steps between sample videos, the last step besides; 0 = none")
    sample_seconds: float = option(3.0, "length of a sample video")
    sample_steps: int = option(8, "sampling steps of a student that was not trained for a number of them")

    validation_every: int = option(0, "steps between validations on the clips of data.validation_share, the last step besides; 0 = none")

    def __post_init__(self) -> None:
        super().__post_init__()
        every = self.every_steps
        require(every >= 1, f"log.every_steps={every}: need at least 1")
        for name in ("samples_every", "histograms_every", "validation_every"):
            value = getattr(self, name)
            fits = value >= 0 and value % every == 0
            require(fits, f"log.{name}={value} must be a multiple of log.every_steps={every}, or 0 for none")
        shown = self.tensorboard or self.wandb != "off" or not self.histograms_every
        require(shown, f"log.histograms_every={self.histograms_every} needs log.tensorboard=true or log.wandb=offline or online")
        require(2 <= self.sample_seconds <= 60, f"log.sample_seconds={self.sample_seconds}: need 2 to 60 seconds")
        require(self.sample_steps >= 1, f"log.sample_steps={self.sample_steps}: need at least 1")


@dataclass
class DataConfig:
    """The training data. `source` names a row of DATASETS; `window` is in latent frames (0 = whole clips)."""

    source: str = option("clips", "clips = made by precompute; drawn = people drawn as they are needed", table=DATASET_TABLE)
    folder: str = option("", "folder of the clips")
    window: int = option(9, "latent frames of a sample; 0 = whole clips")
    validation_share: float = option(0.0, "share of the videos whose clips are held out for log.validation_every; 0 = none")
    split: str = option("train", "train or test: other people, for drawn ones")
    resolution: int = option(192, "side of the face crop of drawn people in pixels")

    def __post_init__(self) -> None:
        one_of(self.source, names_in(DATASET_TABLE), "data.source")
        require(0 <= self.validation_share < 1, f"data.validation_share={self.validation_share}: need a share in [0, 1)")


@dataclass
class TrainConfig(CommandConfig):
    """All options of one training run, whose folder is runs/`name`."""

    name: str = option("train", "name of the folder runs/<name>")
    seed: int = option(0, "of data order, noise and new weights")
    export: str = option("", "where the averaged weights go, .safetensors; empty = nowhere")
    init_from: str = option("", "weights to start from, bundled:preview_dit or a path; names that are absent there keep their own start")
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
        refuse_idle_options(self)
        self.speed = replace(self.speed, precision=precision_of(self.speed.precision, self.model))
