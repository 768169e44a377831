"""Time this machine: python launch/bench.py preview (the main job), dit_medium (a forward), fit (a published model) or scaling."""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sonic.app import Entry, launch  # noqa: E402
from sonic.infer.settings import BenchConfig  # noqa: E402
from sonic.runs import Run  # noqa: E402


def bench(config: BenchConfig, run: Run) -> None:
    """Measure, show the table, write the JSON."""
    begun = time.perf_counter()
    from sonic.infer.bench import bench as measure  # torch and the models: not before the command line is known to be right

    measure(config, begun, ranks=run.ranks)


if __name__ == "__main__":
    words = [item if "=" in item or item.startswith("-") else f"target={item}" for item in sys.argv[1:]]
    launch(Entry("bench", BenchConfig, max_ranks=4096), bench, ["preset=fast_preview", *words])
