"""The command plan: what fits on which hardware, how fast it can be, and why; of a video, or of the training of a recipe."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from sonic.cli import Entry, launch
from sonic.parallel.parallel_config import PlanConfig
from sonic.planner.search import as_json, search_plans
from sonic.system.run_folder import Run
from sonic.training.objective_config import OBJECTIVE_CONFIGS
from sonic.training.plan_training import PlanTrainingConfig, plan_training

ENTRY = Entry("plan", PlanConfig, example="model=live_avatar_14b hardware=4x24gb")
TRAINING_ENTRY = Entry(
    "plan_training",
    PlanTrainingConfig,
    collections=("train", "distill"),
    variants={"objective": OBJECTIVE_CONFIGS},
    location=lambda config: ("runs", ""),
    command="plan",
    example="+distill=live_avatar_4step hardware=4x24gb video.size=384x256",
)
NOTHING_FITS = 3


def plan(config: PlanConfig | PlanTrainingConfig, run: Run) -> int:
    """Plan, show the table, write the JSON; the exit code says whether anything fits."""
    from sonic.planner.table import show  # rich: not before the command line is known to be right

    if config.hardware.name == "here":
        from sonic.planner.hardware import machine_here  # torch: not for hardware that a file describes

        config = replace(config, hardware=machine_here(config.hardware))
    found = search_plans(config) if isinstance(config, PlanConfig) else plan_training(config)
    tracked, why_not = None, ""
    if config.verify and isinstance(config, PlanConfig):
        from sonic.planner.track import track, untracked  # torch

        tracked, why_not = track(found.work, found.hardware, found.chosen), untracked(found.hardware, found.chosen)
    elif config.verify:
        from sonic.training.track_training import track_training, untracked_training  # torch

        tracked, why_not = track_training(config, found.chosen), untracked_training(found.chosen)
    show(found, tracked, untracked=why_not)
    if config.json:
        Path(config.json).write_text(json.dumps(as_json(found, tracked, untracked=why_not), indent=2) + "\n")
    return 0 if found.fits else NOTHING_FITS


def entry_of(argv: list[str]) -> Entry:
    """What a command line asks to plan: a training where it names a recipe, or else a video."""
    named = {item.lstrip("+").partition("=")[0] for item in argv}
    return TRAINING_ENTRY if named & set(TRAINING_ENTRY.collections) else ENTRY


def main(argv: list[str]) -> NoReturn:
    """Leave the process with the exit code of the command."""
    launch(entry_of(argv), plan, argv)
