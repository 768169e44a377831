"""Log of a training run: JSONL in the run folder, a progress bar, and optionally W&B (the only module that imports it)."""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

from sonic.evaluation.sweep import Cell
from sonic.system.files import written_temporary
from sonic.training.train_config import LogConfig

PATIENCE_S = 30  # how long to wait for W&B before the run continues offline
LOG = logging.getLogger(__name__)
SCALARS, SAMPLE = "scalars.jsonl", "eval/sample"
BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"


@dataclass(frozen=True)
class Sample:
    """A sample of the student: metrics by their names in the log, and the video file, None when it could not be written."""

    figures: dict[str, float]
    video: Path | None


SampleMaker = Callable[[int], Sample]  # (step) -> sample of the student at that step; collective


class RunLog:
    """Writes the metrics of a run. With `main=False`, as on all ranks but the main one, it does nothing."""

    def __init__(self, folder: Path, config: LogConfig, *, name: str, main: bool = True) -> None:
        self.folder, self.config, self.name, self.main = folder, config, name, main
        self._file = self._bar = self._wandb = None

    def open(self, step: int, progress: float = 0.0) -> RunLog:
        """Open the log at `step`, at this share of the budget. Lines of later steps, from a run that crashed, are dropped."""
        if not self.main:
            return self
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / SCALARS
        kept = "".join(line for line in _lines(path) if json.loads(line)["step"] <= step)
        with written_temporary(path) as partial:  # a full disk must not lose the existing lines
            partial.write_text(kept)
        self._file = path.open("ab", buffering=0)
        if self.config.bar and sys.stderr.isatty():
            self._bar = tqdm(total=1.0, initial=progress, desc=self.name, dynamic_ncols=True, bar_format=BAR)
        if self.config.wandb != "off":
            self._wandb = _open_wandb(self.folder, self.config, self.name)
        return self

    def scalars(self, step: int, values: Mapping[str, float], video: Path | None = None) -> None:
        """Log `values` of `step`, and the sample video (a file in the run folder) if there is one."""
        if self._file is None:
            return
        shown = {} if video is None else {"video": str(video.relative_to(self.folder))}
        self._append(json.dumps({"step": step, "time": round(time.time(), 2), **values, **shown}) + "\n")
        if self._wandb is not None:
            import wandb

            media = {} if video is None else {SAMPLE: wandb.Video(str(video), format="mp4")}
            self._wandb.log({**values, **media}, step=step)
        if self._bar is None:
            LOG.info("step %d %s", step, " ".join(f"{k.rsplit('/', 1)[-1]}={v:.4g}" for k, v in values.items()))

    def _append(self, line: str) -> None:
        """Append a line completely or not at all: a full disk loses lines but does not end the run."""
        end, data = self._file.tell(), line.encode()
        try:
            if self._file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            LOG.warning("a line of %s could not be written (%s); training goes on", self.folder / SCALARS, error)
            with suppress(OSError):
                self._file.truncate(end)

    def tick(self, step: int, progress: float, text: str) -> None:
        """Move the progress bar to a share of the budget, and show `step` and `text` beside it."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"step {step}, {text}", refresh=False)
            self._bar.update(progress - self._bar.n)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for part in (self._bar, self._file):
            if part is not None:
                part.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(error is not None))
        self._file = self._bar = self._wandb = None


def _lines(path: Path) -> list[str]:
    """Complete lines of the file, without a last line that a crash cut short."""
    if not path.exists():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]


def _open_wandb(folder: Path, config: LogConfig, name: str, *, group: str | None = None):
    """Start a W&B run, or continue the one whose id is in the folder. Falls back to offline mode when W&B cannot be reached.

    Raises ValueError when W&B is not installed.
    """
    try:
        import wandb
    except ImportError as error:
        way_out = "run: pip install wandb, or use log.wandb=off"
        raise ValueError(f"log.wandb={config.wandb} needs W&B, which is not installed; {way_out}") from error
    id_file = folder / "wandb_id.txt"
    run_id = id_file.read_text().strip() if id_file.exists() else uuid.uuid4().hex[:8]
    id_file.write_text(run_id)
    keywords = {"project": config.project, "name": name, "id": run_id, "resume": "allow", "dir": str(folder), "group": group}
    keywords["settings"] = wandb.Settings(init_timeout=PATIENCE_S)
    try:
        return wandb.init(mode=config.wandb, **keywords)
    except wandb.errors.Error as error:
        LOG.warning("W&B cannot be used (%s); logging offline under %s", str(error).splitlines()[0], folder)
        wandb.teardown()  # its service still holds the failed run
        return wandb.init(mode="offline", **keywords)


def log_cells(cells: Sequence[Cell], config: LogConfig, *, group: str) -> None:
    """Log the figures of every finished seed of a sweep's cells as runs of one W&B group, with the whole configs; those of a training go
    to its own run. Does nothing with log.wandb=off."""
    if config.wandb == "off":
        return
    for cell in cells:
        for seed, figures in cell.seed_figures.items():
            folder = cell.run_folder(seed)
            run = _open_wandb(folder, config, f"{cell.name}, seed {seed}", group=group)
            run.config.update({**cell.config, **cell.choices, "seed": seed}, allow_val_change=True)
            run.summary.update({f"eval/{name}": value["mean"] if isinstance(value, dict) else value for name, value in figures.items()})
            run.finish()
