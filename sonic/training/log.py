"""The log of a training run, written to every destination that the options ask for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from sonic.training.histograms import Histogram
from sonic.training.lineage import Artifact
from sonic.training.log_destination import ConsoleLines, JsonLines, LogDestination, LoggedRun, ProgressBar
from sonic.training.tensorboard_log import TensorBoardLog
from sonic.training.train_config import LogConfig
from sonic.training.wandb_log import WandbLog

DESTINATIONS: dict[str, type[LogDestination]] = {  # opened in this order by those options that want them
    "jsonl": JsonLines,
    "console": ConsoleLines,
    "bar": ProgressBar,
    "wandb": WandbLog,
    "tensorboard": TensorBoardLog,
}


@dataclass(frozen=True)
class Sample:
    """A sample of the student: metrics by their names in the log, and the video file, None when it could not be written."""

    figures: dict[str, float]
    video: Path | None


SampleMaker = Callable[[int], Sample]  # (step) -> sample of the student at that step; collective


class RunLog:
    """The log of a run; its `facts` and `inputs` are logged when it opens. With `main=False`, as on all ranks but the main one, it does
    nothing. Contexts may be nested: the outermost closes it.

    Raises ValueError when a package that a destination needs is missing.
    """

    def __init__(self, folder: Path, config: LogConfig, *, name: str, main: bool = True) -> None:
        self.folder, self.config, self.name = folder, config, name
        self.facts: Mapping[str, Any] = {}
        self.inputs: Sequence[Artifact] = ()
        self._kinds = [kind for kind in DESTINATIONS.values() if main and kind.wanted(config)]
        self._open: list[LogDestination] = []
        self._depth = 0

    def open(self, step: int, progress: float = 0.0) -> RunLog:
        """Open the log at `step`, at this share of the budget. Lines of later steps, from a run that crashed, are dropped."""
        if self._kinds:
            self.folder.mkdir(parents=True, exist_ok=True)
        run = LoggedRun(self.folder, self.config, self.name, step, progress, self.facts)
        for kind in self._kinds:
            self._open.append(kind(run))
        for artifact in self.inputs:
            self.artifact(artifact, made=False)
        return self

    def scalars(self, step: int, values: Mapping[str, float], video: Path | None = None) -> None:
        """Log `values` of `step`, and the sample video (a file in the run folder) if there is one."""
        for destination in self._open:
            destination.scalars(step, values, video)

    def histograms(self, step: int, values: Mapping[str, Histogram]) -> None:
        """Log the distributions of gradients and weights before `step`."""
        for destination in self._open:
            destination.histograms(step, values)

    def tick(self, step: int, progress: float, figures: Mapping[str, float]) -> None:
        """Show how far the run is: the share of its budget, and the figures of its last line."""
        for destination in self._open:
            destination.tick(step, progress, figures)

    def artifact(self, artifact: Artifact, *, made: bool = True) -> None:
        """Log something that the run made, or that it uses."""
        for destination in self._open:
            destination.artifact(artifact, made=made)

    def __enter__(self) -> RunLog:
        self._depth += 1
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._depth -= 1
        while self._open and not self._depth:
            self._open.pop().close(failed=error is not None)
