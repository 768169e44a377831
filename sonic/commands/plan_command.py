"""The command plan: estimate the memory and the speed of a video or of a training recipe on some hardware."""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import NoReturn

from sonic.cli import Entry, launch
from sonic.compose import RECIPE
from sonic.parallel.parallel_config import PlanConfig
from sonic.planner.search import PlanResult, Tracked, as_json, search_plans
from sonic.system.files import write_json
from sonic.system.program import written
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
    """Plan, print the table, write the JSON. Returns exit code 0 if a plan fits, else 3."""
    from sonic.planner.table import show  # imports rich, so only after the command line is checked

    if config.hardware.name == "here":
        from sonic.planner.hardware import machine_here  # imports torch, which hardware described in a file does not need

        config = replace(config, hardware=machine_here(config.hardware))
    found = search_plans(config) if isinstance(config, PlanConfig) else plan_training(config)
    found = replace(found, asked=tuple(shlex.split(run.command)[len(shlex.split(written("plan"))) :]))
    tracked = _tracked(config, found) if config.verify else None
    show(found, tracked)
    if config.json:
        write_json(as_json(found, tracked), config.json)
    return 0 if found.fits else NOTHING_FITS


def _tracked(config: PlanConfig | PlanTrainingConfig, found: PlanResult) -> Tracked:
    """The memory of the chosen plan in a run on fake tensors. Imports torch."""
    if isinstance(config, PlanConfig):
        from sonic.planner.track import track

        return track(found)
    from sonic.training.track_training import track_training

    return track_training(config, found.chosen)


def entry_of(argv: list[str]) -> Entry:
    """The entry for a command line: training if it names a recipe (train or distill), else video."""
    named = {item.lstrip("+").partition("=")[0] for item in argv}
    return TRAINING_ENTRY if named & {RECIPE, *TRAINING_ENTRY.collections} else ENTRY


def main(argv: list[str]) -> NoReturn:
    """Run the command and exit the process with its exit code."""
    launch(entry_of(argv), plan, argv)
