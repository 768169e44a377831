"""A place where the log of a training run goes: the interface, and the two that need no further package (JSONL, the console)."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sonic.system.files import written_temporary
from sonic.training.histograms import Histogram
from sonic.training.lineage import Artifact
from sonic.training.train_config import LogConfig

LOG = logging.getLogger(__name__)
SCALARS, SAMPLE = "scalars.jsonl", "eval/sample"
BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"


@dataclass(frozen=True)
class LoggedRun:
    """A run as a destination sees it when it opens: folder, options, name, the step and the share of the budget where it starts or goes
    on, and the facts (whole config, code, machine) that belong to it."""

    folder: Path
    config: LogConfig
    name: str
    step: int
    progress: float
    facts: Mapping[str, Any] = field(default_factory=dict)


class LogDestination:
    """One place where a log goes; opened by `__init__(run)` on the main process. What a destination does not override, it does not keep."""

    @classmethod
    def wanted(cls, config: LogConfig) -> bool:
        """Whether the options ask for it. Raises ValueError when its package is missing."""
        return True

    def scalars(self, step: int, values: Mapping[str, float], video: Path | None = None) -> None:
        """Log the figures of a step, and its sample video."""

    def histograms(self, step: int, values: Mapping[str, Histogram]) -> None:
        """Log the distributions of gradients and weights."""

    def tick(self, step: int, progress: float, figures: Mapping[str, float]) -> None:
        """Show how far the run is: the share of its budget, and the figures of its last line."""

    def artifact(self, artifact: Artifact, *, made: bool) -> None:
        """Log something that the run made, or that it uses."""

    def close(self, *, failed: bool) -> None:
        """End the log of a run that has ended, or has failed."""


class JsonLines(LogDestination):
    """`scalars.jsonl` in the run folder. Lines of later steps, from a run that crashed, are dropped when it is opened."""

    def __init__(self, run: LoggedRun) -> None:
        self.folder, self.path = run.folder, run.folder / SCALARS
        kept = "".join(line for line in _lines(self.path) if json.loads(line)["step"] <= run.step)
        with written_temporary(self.path) as partial:  # a full disk must not lose the existing lines
            partial.write_text(kept)
        self.file = self.path.open("ab", buffering=0)

    def scalars(self, step: int, values: Mapping[str, float], video: Path | None = None) -> None:
        """Append a line completely or not at all: a full disk loses lines but does not end the run."""
        shown = {} if video is None else {"video": str(video.relative_to(self.folder))}
        data = f"{json.dumps({'step': step, 'time': round(time.time(), 2), **values, **shown})}\n".encode()
        end = self.file.tell()
        try:
            if self.file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            LOG.warning("a line of %s could not be written (%s); training goes on", self.path, error)
            with suppress(OSError):
                self.file.truncate(end)

    def close(self, *, failed: bool) -> None:
        """Close the file."""
        self.file.close()


class ConsoleLines(LogDestination):
    """A line of the program's log for every line of figures, where there is no progress bar."""

    @classmethod
    def wanted(cls, config: LogConfig) -> bool:
        """Whether there is no bar."""
        return not ProgressBar.wanted(config)

    def __init__(self, run: LoggedRun) -> None:
        """Nothing is opened."""

    def scalars(self, step: int, values: Mapping[str, float], video: Path | None = None) -> None:
        """Log the figures but for those of single noise levels."""
        LOG.info("step %d %s", step, " ".join(f"{name}={value:.4g}" for name, value in values.items() if "_sigma_" not in name))


class ProgressBar(LogDestination):
    """A progress bar on a terminal."""

    @classmethod
    def wanted(cls, config: LogConfig) -> bool:
        """Whether log.bar=true on a terminal."""
        return config.bar and sys.stderr.isatty()

    def __init__(self, run: LoggedRun) -> None:
        self.bar = tqdm(total=1.0, initial=run.progress, desc=run.name, dynamic_ncols=True, bar_format=BAR)

    def tick(self, step: int, progress: float, figures: Mapping[str, float]) -> None:
        """Move the bar, and show step, loss and speed beside it."""
        loss, speed = figures.get("student/loss", math.nan), figures.get("perf/samples_per_second", math.nan)
        self.bar.set_postfix_str(f"step {step}, loss {loss:.4f}, {speed:.1f} samples/s", refresh=False)
        self.bar.update(progress - self.bar.n)

    def close(self, *, failed: bool) -> None:
        """Leave the bar as it is."""
        self.bar.close()


def _lines(path: Path) -> list[str]:
    """Complete lines of the file, without a last line that a crash cut short."""
    if not path.exists():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]
