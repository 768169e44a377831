"""What a line of the log says: means of the figures since the line before, seconds and samples by role, and memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from sonic.evaluation.metrics import peak_rss_gib
from sonic.training.objectives.objective import Batch

RESIDENT = Path("/proc/self/statm")  # where Linux says how many pages of memory this process has


class Meter:
    """Sums since the last line. `sums` are the total and the weight of each figure; an update uses `samples` samples."""

    def __init__(self, sums: Mapping[str, Sequence[float]], *, samples: int, device: torch.device) -> None:
        self.sums = {name: (total, weight) for name, (total, weight) in sums.items()}
        self._samples, self._device = samples, device
        self.restart()

    def restart(self) -> None:
        """Begin to measure time: at the start, and after what the log does itself, such as sample videos."""
        self._began, self._waited, self.steps = time.monotonic(), 0.0, 0
        self._roles: dict[str, tuple[float, int]] = {}  # seconds and number of updates

    def batches(self, stream: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; the time that each takes to come counts as waiting for data."""
        start = time.monotonic()
        for batch in stream:
            self._waited += time.monotonic() - start
            yield batch
            start = time.monotonic()

    @contextmanager
    def update(self, role: str) -> Iterator[None]:
        """Context of an update of `role`, at whose end the host has waited for the device."""
        start = time.monotonic()
        yield
        seconds, count = self._roles.get(role, (0.0, 0))
        self._roles[role] = seconds + time.monotonic() - start, count + 1

    def add(self, figures: Mapping[str, tuple[float, float]]) -> None:
        """Count figures of an update: total and weight each."""
        for name, (total, weight) in figures.items():
            before = self.sums.get(name, (0.0, 0.0))
            self.sums[name] = before[0] + total, before[1] + weight

    def line(self) -> dict[str, float]:
        """The figures since the last line; one without weight, such as the loss at a noise level that no sample had, is absent."""
        seconds, updates = time.monotonic() - self._began, sum(count for _, count in self._roles.values())
        figures = {name: total / weight for name, (total, weight) in self.sums.items() if weight}
        figures |= {"perf/seconds_per_step": seconds / self.steps, "perf/samples_per_second": self._samples * updates / seconds}
        figures["perf/data_seconds_per_step"] = self._waited / self.steps
        for role, (spent, count) in self._roles.items():
            figures |= {f"perf/seconds_per_update_{role}": spent / count, f"perf/samples_per_second_{role}": self._samples * count / spent}
        self.sums = {}
        return figures | memory(self._device)


def memory(device: torch.device) -> dict[str, float]:
    """Memory in GiB, allocated and at most: of the GPU since the last call, or of this process when training on the CPU."""
    if device.type == "cuda":
        peak, now = torch.cuda.max_memory_allocated(device) / 2**30, torch.cuda.memory_allocated(device) / 2**30
        torch.cuda.reset_peak_memory_stats(device)
        return {"perf/peak_gib": peak, "perf/allocated_gib": now}
    figures = {"perf/peak_gib": peak_rss_gib()}  # since the start: others read the same counter
    if RESIDENT.is_file():
        figures["perf/allocated_gib"] = int(RESIDENT.read_text().split()[1]) * resource.getpagesize() / 2**30
    return figures
