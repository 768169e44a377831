"""Options of a training that the planner plans: what of a recipe decides over memory and time. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from sonic.config import AdapterConfig, one_of, option, require

VIDEO = "video"
OBJECTIVES = ("", "dmd", "flow_match")  # none = a video; the others are rows of the trainings' own table
PRECISIONS = ("float32", "bfloat16")


@dataclass
class TaskConfig:
    """What is planned: a video, or the training of one of the recipes."""

    name: str = option(VIDEO, "one of the files in conf/task: video = make videos, the others are trainings")
    objective: str = option("", "of a training: dmd or flow_match")
    window: int = option(12, "latent frames of a sample")
    past: int = option(0, "how many of them are given as motion memory")
    batch_size: int = option(1, "samples that a rank works on at once")
    accumulate: int = option(16, "batches of a step, all ranks together")
    precision: str = option("bfloat16", "in which it computes: float32 or bfloat16")
    recompute: bool = option(True, "layers are computed again for the gradient instead of remembered")
    critic_turns: int = option(5, "dmd: updates of the critic before each of the student")
    teacher_guide_scale: float = option(1.0, "dmd: guidance of the teacher; 1 = off, and half the work")
    learn: AdapterConfig = option(AdapterConfig)

    def __post_init__(self) -> None:
        one_of(self.objective, OBJECTIVES, "task.objective")
        one_of(self.precision, PRECISIONS, "task.precision")
        require(bool(self.objective) == (self.name != VIDEO), f"task={self.name} goes with another task.objective than {self.objective!r}")
        for name in ("window", "batch_size", "accumulate", "critic_turns"):
            require(getattr(self, name) >= 1, f"task.{name}={getattr(self, name)}: need at least 1")
        require(0 <= self.past < self.window, f"task.past={self.past} must lie between 0 and task.window={self.window}")
