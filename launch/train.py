"""Train from a recipe: python launch/train.py +train=preview_dit or +distill=preview_2step [overrides]; recipes/ has them."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sonic.app import Entry, launch  # noqa: E402
from sonic.runs import Run  # noqa: E402
from sonic.train.objective_settings import OBJECTIVE_CONFIGS  # noqa: E402
from sonic.train.settings import TrainConfig  # noqa: E402


def train(config: TrainConfig, run: Run) -> None:
    """Train in runs/<name>; a run that was stopped continues there."""
    from sonic.train.build import run_training

    def opened() -> None:
        run.keep()  # checkpoints
        run.open()

    run_training(config, run.path, commit=run.commit, command=run.command, opened=opened)


ENTRY = Entry(
    "train", TrainConfig, collections=("train", "distill"), variants={"objective": OBJECTIVE_CONFIGS},
    place=lambda config: ("runs", config.name), max_ranks=4096,
)  # fmt: skip

if __name__ == "__main__":
    launch(ENTRY, train)
