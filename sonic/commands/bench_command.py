"""The command bench: run a benchmark on this machine."""

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
    from sonic.bench.benchmark import bench as measure  # imports torch, so only after the command line is checked

    measure(config, begun, ranks=run.ranks)


def spelled(argv: Sequence[str]) -> list[str]:
    """Expand a bare word to the target (preview to target=preview) and put the preset fast_preview before all options."""
    return ["preset=fast_preview", *(item if "=" in item or item.startswith("-") else f"target={item}" for item in argv)]


def main(argv: list[str]) -> NoReturn:
    """Run the command and exit the process with its exit code."""
    launch(ENTRY, bench, spelled(argv))
