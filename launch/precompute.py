"""Make training data: python launch/precompute.py +precompute=preview_voices [overrides]."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sonic.app import Entry, launch  # noqa: E402
from sonic.data.settings import PrecomputeConfig  # noqa: E402
from sonic.runs import Run  # noqa: E402


def make(config: PrecomputeConfig, run: Run) -> None:
    """Make what is missing of the data set."""
    from sonic.data.precompute import precompute
    from sonic.train.encoders import build_encoders, clip_hashes

    run.keep()  # finished shards
    precompute(config, build_encoders, clip_hashes)


if __name__ == "__main__":
    place = lambda config: ("runs", "precompute")  # noqa: E731
    launch(Entry("precompute", PrecomputeConfig, collections=("precompute",), place=place), make)
