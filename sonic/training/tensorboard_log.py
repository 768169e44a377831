"""The log of a run in TensorBoard's files (the only module that writes them)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from sonic.config import require
from sonic.training.histograms import Histogram
from sonic.training.log_destination import SAMPLE, LogDestination, LoggedRun
from sonic.training.train_config import LogConfig

FOLDER = "tensorboard"  # in the run folder


class TensorBoardLog(LogDestination):
    """Curves, histograms, the paths of sample videos, and the facts as text. Steps that a crashed run logged too far are hidden."""

    @classmethod
    def wanted(cls, config: LogConfig) -> bool:
        """Whether log.tensorboard=true. Raises ValueError when TensorBoard is not installed."""
        there = not config.tensorboard or find_spec("tensorboard") is not None
        require(there, "log.tensorboard=true needs TensorBoard, which is not installed; run: pip install tensorboard, or use false")
        return config.tensorboard

    def __init__(self, run: LoggedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run.folder / FOLDER), purge_step=run.step + 1)
        self.writer.add_text("config", f"```json\n{json.dumps(run.facts, indent=1)}\n```", run.step)

    def scalars(self, step: int, values: Mapping[str, float], video: Path | None = None) -> None:
        """Log the figures, and where the video is."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        if video is not None:
            self.writer.add_text(SAMPLE, str(video), step)
        self.writer.flush()

    def histograms(self, step: int, values: Mapping[str, Histogram]) -> None:
        """Log histograms; sums of values and squares are those of the bins' middles."""
        for name, (counts, edges) in values.items():
            middles, total = (edges[1:] + edges[:-1]) / 2, int(counts.sum())
            sums = {"sum": float(counts @ middles), "sum_squares": float(counts @ middles**2)}
            limits = {"bucket_limits": edges[1:].tolist(), "bucket_counts": counts.tolist()}
            self.writer.add_histogram_raw(name, float(edges[0]), float(edges[-1]), total, **sums, **limits, global_step=step)

    def close(self, *, failed: bool) -> None:
        """Write what is left."""
        self.writer.close()
