"""The command bench: run a benchmark on this machine."""

from __future__ import annotations

import time
from functools import partial

from sonic.cli import Entry, launch
from sonic.inference.infer_config import BenchConfig
from sonic.system.run_folder import Run


def with_target(argv: list[str]) -> list[str]:
    """Expand a bare word to the target (preview to target=preview) and put the preset fast_preview before all options."""
    return ["preset=fast_preview", *(item if "=" in item or item.startswith("-") else f"target={item}" for item in argv)]


ENTRY = Entry("bench", BenchConfig, rewrite=with_target, max_ranks=4096, example="preview json=out.json")


def bench(config: BenchConfig, run: Run) -> None:
    """Measure, show the table, write the JSON."""
    begun = time.perf_counter()
    from sonic.bench.benchmark import bench as measure  # imports torch, so only after the command line is checked

    measure(config, begun, ranks=run.ranks)


main = partial(launch, ENTRY, bench)
