"""Times the transformer on this CPU as it is and with compiled regions, in turns: `python tests/compile_table.py [rounds]`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from sonic.bench.forward_time import CLIP, DTYPES, MEDIUM, PAST_LATENTS, ClipForward, fastest
from sonic.cli import Entry, compose
from sonic.inference.infer_config import InferConfig
from sonic.model.compile import COMPILE_TIME


def rows(rounds: int) -> Iterator[str]:
    """A line for each model and dtype: milliseconds of the fastest forward of each kind."""
    preview = compose(Entry("infer", InferConfig), ["preset=fast_preview"]).model
    for name, config, clip, past in (("preview", preview, (3, 24, 24), 0), ("dit_medium", MEDIUM, CLIP, PAST_LATENTS)):
        for dtype_name, dtype in DTYPES.items():
            forward, before = ClipForward(config, dtype, clip, past=past), COMPILE_TIME.seconds

            def run(compiled: bool, forward: ClipForward = forward) -> None:
                forward.model.compiled = compiled
                forward()

            jobs = {"plain": lambda run=run: run(False), "compiled": lambda run=run: run(True)}
            fastest(jobs, 2)  # compiles
            best = fastest(jobs, rounds)
            figures = "   ".join(f"{job} {1000 * seconds:8.2f} ms" for job, seconds in best.items())
            yield f"{name:11s} {dtype_name}   {figures}   compiled in {COMPILE_TIME.seconds - before:.0f} s"


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, 1 thread")
    for row in rows(int(sys.argv[1]) if len(sys.argv) > 1 else 20):
        print(row, flush=True)
