"""Make training data: python launch/precompute.py +precompute=preview_voices [overrides]."""

from __future__ import annotations

from sonic.app import Entry, launch
from sonic.data.settings import PrecomputeConfig
from sonic.runs import Run


def make(config: PrecomputeConfig, run: Run) -> None:
    """Make what is missing of the data set."""
    from sonic.data.precompute import precompute
    from sonic.train.encoders import build_encoders

    precompute(config, build_encoders)


if __name__ == "__main__":
    place = lambda config: ("runs", "precompute")  # noqa: E731
    launch(Entry("precompute", PrecomputeConfig, collections=("precompute",), place=place), make)
