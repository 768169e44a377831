"""The command precompute: make a data set for training."""

from __future__ import annotations

from functools import partial

from sonic.cli import Entry, launch
from sonic.data.data_config import PrecomputeConfig
from sonic.system.run_folder import Run

ENTRY = Entry(
    "precompute",
    PrecomputeConfig,
    collections=("precompute",),
    location=lambda config: ("runs", "precompute"),
    example="+precompute=preview_voices",
)


def make(config: PrecomputeConfig, run: Run) -> None:
    """Make the missing shards of the data set, its index and its statistics."""
    from sonic.data.precompute import precompute
    from sonic.training.clip_encoders import build_encoders, clip_hashes

    run.keep()  # finished shards survive a failed run
    precompute(config, build_encoders, clip_hashes)


main = partial(launch, ENTRY, make)
