"""The planner's answer about a training for people: its plans, the chosen one moment by moment, what would help when nothing fits."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from sonic.planner.memory import GIB
from sonic.planner.table import begin, end_in_need
from sonic.planner.training_memory import ITEMS
from sonic.planner.training_plans import PlannedTraining, TrainingPlan, training_reason
from sonic.system.program import written


def show_training(
    found: PlannedTraining, tracked: Mapping[str, float] | None = None, *, untracked: str = "", console: Console | None = None
) -> None:
    """Print the answer; `tracked` = GiB of the chosen plan by moment on fake tensors, `untracked` = why these are not known although
    they were asked for."""
    work = found.work
    what = f"{work.task.name} ({work.task.objective}) of {work.model.name}, {work.width}x{work.height}, {work.clip} tokens in a clip"
    console = begin(found, what, console)
    console.print(_plans(found))
    console.print(_moments(found.chosen, tracked))
    if untracked:
        console.print(f"not tracked: {untracked}")
    if found.fits:
        console.print(f"{written('train')} with: {' '.join(found.chosen.knobs)}")
        return
    peaks = [change.plan.peak_gib for change in found.changes]
    end_in_need(found, peaks, "plan, batch, adapters, length or size", console=console)


def _plans(found: PlannedTraining) -> Table:
    table = Table("plan", "ranks to a batch", "fits", "GiB", "host GiB", "s/step", "frames/s", "why")
    for plan in found.plans:
        fits = "yes" if plan.missing_gib(found.hardware) == 0 else "no"
        seconds = plan.seconds.total
        figures = (plan.peak_gib, plan.host / GIB, seconds, plan.frames / seconds)
        row = [plan.name, str(plan.parallel.context), fits, *(f"{figure:.2f}" for figure in figures)]
        table.add_row(*row, training_reason(plan, found.hardware), style="bold" if plan is found.chosen else None)
    return table


def _moments(plan: TrainingPlan, tracked: Mapping[str, float] | None) -> Table:
    """Every moment of a step, item by item."""
    table = Table("GiB of a rank", *plan.moments, title=f"{plan.name}, moment by moment")
    for item in ITEMS:
        found = [items[item] / GIB for items in plan.moments.values()]
        if any(found):
            table.add_row(item.replace("_", " "), *(f"{size:.2f}" for size in found))
    predicted = {moment: sum(items.values()) / GIB for moment, items in plan.moments.items()}
    table.add_row("predicted", *(f"{value:.2f}" for value in predicted.values()), style="bold")
    if tracked is not None:
        table.add_row("tracked", *(f"{tracked[moment]:.2f}" if moment in tracked else "" for moment in predicted), style="bold")
        peak = max(predicted.values()) / max(tracked.values()) - 1
        table.add_row("predicted / tracked - 1", *(f"{peak:+.1%}" if moment == plan.fullest else "" for moment in predicted))
    return table
