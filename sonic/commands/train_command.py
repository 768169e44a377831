"""The command train: run a training recipe."""

from __future__ import annotations

from functools import partial

from sonic.cli import Entry, launch
from sonic.system.run_folder import Run
from sonic.system.stdio import exit_code_of
from sonic.training.objective_config import OBJECTIVE_CONFIGS
from sonic.training.train_config import TrainConfig

ENTRY = Entry(
    "train",
    TrainConfig,
    collections=("train", "distill"),
    variants={"objective": OBJECTIVE_CONFIGS},
    location=lambda config: ("runs", config.name),
    max_ranks=4096,
    example="+distill=preview_2step",
    would_help="sonic.training.plan_training.would_help",
)


def train(config: TrainConfig, run: Run) -> int:
    """Train in runs/<name>; a run that was stopped continues from its last checkpoint. Gives the exit code."""
    from sonic.training.build import run_training

    def on_built() -> None:
        run.keep(continues=True)  # checkpoints survive a failed run
        run.open()

    outcome = run_training(config, run.path, commit=run.commit, command=run.command, on_built=on_built, ranks=run.ranks)
    return exit_code_of(outcome.signal)


main = partial(launch, ENTRY, train)
