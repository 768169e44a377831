"""The command bench: this machine timed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NoReturn

from sonic.cli import Entry, launch
from sonic.inference.infer_config import BenchConfig
from sonic.system.run_folder import Run

ENTRY = Entry("bench", BenchConfig, max_ranks=4096, example="preview json=out.json")


def bench(config: BenchConfig, run: Run) -> None:
    """Measure, show the table, write the JSON."""
    begun = time.perf_counter()
    from sonic.bench.benchmark import bench as measure  # torch and the models: not before the command line is known to be right

    measure(config, begun, ranks=run.ranks)


def spelled(argv: Sequence[str]) -> list[str]:
    """A bare word is the target: preview is target=preview. Every target starts from the preset fast_preview."""
    return ["preset=fast_preview", *(item if "=" in item or item.startswith("-") else f"target={item}" for item in argv)]


def main(argv: list[str]) -> NoReturn:
    """Leave the process with the exit code of the command."""
    launch(ENTRY, bench, spelled(argv))
