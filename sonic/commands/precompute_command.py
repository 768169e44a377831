"""The command precompute: training data made once."""

from __future__ import annotations

from typing import NoReturn

from sonic.cli import Entry, launch
from sonic.data.data_config import PrecomputeConfig
from sonic.system.run_folder import Run

ENTRY = Entry(
    "precompute",
    PrecomputeConfig,
    collections=("precompute",),
    place=lambda config: ("runs", "precompute"),
    example="+precompute=preview_voices",
)


def make(config: PrecomputeConfig, run: Run) -> None:
    """Make what is missing of the data set."""
    from sonic.data.precompute import precompute
    from sonic.training.clip_encoders import build_encoders, clip_hashes

    run.keep()  # finished shards
    precompute(config, build_encoders, clip_hashes)


def main(argv: list[str]) -> NoReturn:
    """Leave the process with the exit code of the command."""
    launch(ENTRY, make, argv)
