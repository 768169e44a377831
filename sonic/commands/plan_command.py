"""The command plan: what fits on which hardware, how fast it can be, and why."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from sonic.cli import Entry, launch
from sonic.parallel.parallel_config import PlanConfig
from sonic.planner.search import Planned, as_json, planned
from sonic.planner.training_plans import PlannedTraining, planned_training, training_json, untracked_training
from sonic.system.run_folder import Run

ENTRY = Entry("plan", PlanConfig, example="model=live_avatar_14b hardware=4x24gb")
NOTHING_FITS = 3


def plan(config: PlanConfig, run: Run) -> int:
    """Plan, show the table, write the JSON; the exit code says whether anything fits."""
    if config.hardware.name == "here":
        from sonic.planner.hardware import machine_here  # torch: not for hardware that a file describes

        config = replace(config, hardware=machine_here(config.hardware))
    found, answer = (training if config.task.objective else film)(config)
    if config.json:
        Path(config.json).write_text(json.dumps(answer, indent=2) + "\n")
    return 0 if found.fits else NOTHING_FITS


def film(config: PlanConfig) -> tuple[Planned, dict]:
    """The plans of a film, shown, and as JSON."""
    from sonic.planner.table import show  # rich: not before the command line is known to be right

    found = planned(config)
    tracked, why_not = None, ""
    if config.verify:
        from sonic.planner.track import track, untracked  # torch

        tracked, why_not = track(found.work, found.hardware, found.chosen), untracked(found.hardware, found.chosen)
    show(found, tracked, untracked=why_not)
    return found, as_json(found, tracked, untracked=why_not)


def training(config: PlanConfig) -> tuple[PlannedTraining, dict]:
    """The plans of a training, shown, and as JSON."""
    from sonic.planner.training_table import show_training  # rich

    found = planned_training(config)
    tracked, why_not = None, ""
    if config.verify:
        from sonic.training.track_training import track_training  # torch

        tracked, why_not = track_training(found.work, found.hardware, found.chosen), untracked_training(found.chosen)
    show_training(found, tracked, untracked=why_not)
    return found, training_json(found, tracked, untracked=why_not)


def main(argv: list[str]) -> NoReturn:
    """Leave the process with the exit code of the command."""
    launch(ENTRY, plan, argv)
