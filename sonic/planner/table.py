"""Prints the planner's result: a table of plans, the items of the chosen one, and changes that help when none fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from sonic.planner.memory import GIB, peak, union
from sonic.planner.plans import Plan
from sonic.planner.search import Job, PlanResult, Tracked, reason
from sonic.planner.workload import Training

Ranks = Sequence[Mapping[str, float]]  # GiB of every rank by phase; empty when it was not tracked


class Column(NamedTuple):
    """A column of the table, a rank of a video or a phase of a training: bytes by item, and the predicted and tracked peaks in GiB."""

    items: Mapping[str, float]
    predicted: float
    tracked: float | None
    blocks: range | None = None


def show(found: PlanResult, tracked: Tracked | None = None, *, console: Console | None = None) -> None:
    """Print the result, with the tracked memory of the chosen plan if that was asked for."""
    console, hardware, plan = console or Console(width=None if Console().is_terminal else 150), found.hardware, found.chosen
    machines = f", on {hardware.nodes} machines" if hardware.nodes > 1 else ""
    console.print(f"{_job(found.work)} on {hardware.name}: {hardware.ranks} x {hardware.usable_gib:g} GiB usable{machines}")
    for note in found.notes:
        console.print(f"[dim]{note}[/dim]")
    console.print(_plans(found))
    console.print(_items(plan, tracked.ranks if tracked else ()))
    if tracked and tracked.reason:
        console.print(f"not tracked: {tracked.reason}")
    if found.fits:
        for each in (each for each in found.plans if not each.missing_gib(hardware)):  # not broken into lines, so that it can be copied
            line = f"run {each.name}: {found.command(each)}"
            console.print(line, soft_wrap=True, markup=False, highlight=False, style="bold" if each is plan else "dim")
        return
    console.print(f"[bold]nothing fits[/bold]: the least demanding plan, {plan.name}, lacks {plan.missing_gib(hardware):.2f} GiB")
    for change in found.changes:
        console.print(
            f"  would fit: {change.sentence} ({' '.join(change.options)}): {change.plan.name}, {max(change.plan.peak_gib):.2f} GiB"
        )
    if not found.changes:
        console.print("  no single change of plan, length, size or what else can be less makes it fit; it needs more memory")


def _job(work: Job) -> str:
    """The planned job in a few words."""
    of = f"{work.model.name}, {work.width}x{work.height}"
    if isinstance(work, Training):
        return f"{work.recipe.name} ({work.recipe.objective.name}) of {of}, {work.tokens} tokens in a clip"
    return f"{of}, {work.about}"


def _plans(found: PlanResult) -> Table:
    unit = found.chosen.unit
    table = Table("plan", "sharing ranks", "fits", "GiB", "host GiB", f"s/{unit}", "frames/s", "first s", "why")
    for plan in found.plans:
        fits = plan.missing_gib(found.hardware) == 0
        figures = (max(plan.peak_gib), plan.host / GIB, plan.seconds.total, plan.frames_per_second, plan.seconds.first)
        row = [plan.name, str(plan.parallel.context), "yes" if fits else "no", *(f"{figure:.2f}" for figure in figures)]
        table.add_row(*row, reason(plan, found.hardware), style="bold" if plan is found.chosen else None)
    return table


def _items(plan: Plan, tracked: Ranks) -> Table:
    """The table of items by rank for a video, and by phase for a training, whose ranks are equal."""
    columns = _phases(plan, tracked) if plan.unit == "step" else _ranks(plan, tracked)
    table = Table("GiB", *columns, title=f"{plan.name}, {'phase by phase' if plan.unit == 'step' else 'rank by rank'}")
    for item in dict.fromkeys(item for column in columns.values() for item in column.items):
        sizes = [column.items.get(item, 0.0) / GIB for column in columns.values()]
        if any(sizes):
            first = " (first)" if item.endswith("encoder") else ""
            table.add_row(item.replace("_", " ") + first, *(f"{size:.2f}" for size in sizes))
    table.add_row("predicted peak", *(f"{column.predicted:.2f}" for column in columns.values()), style="bold")
    if tracked:
        known = [column.tracked for column in columns.values()]
        table.add_row("tracked peak", *("" if each is None else f"{each:.2f}" for each in known), style="bold")
        errors = ["" if column.tracked is None else f"{column.predicted / column.tracked - 1:+.1%}" for column in columns.values()]
        table.add_row("predicted / tracked - 1", *errors)
    if plan.ranges:
        spans = (column.blocks for column in columns.values())
        table.add_row("blocks", *(f"{span.start}..{span.stop - 1}" if span else "none" for span in spans))
    return table


def _phases(plan: Plan, tracked: Ranks) -> dict[str, Column]:
    found = tracked[0] if tracked else {}
    return {phase: Column(items, sum(items.values()) / GIB, found.get(phase)) for phase, items in plan.ranks[0].items()}


def _ranks(plan: Plan, tracked: Ranks) -> dict[str, Column]:
    """One column for each group of equal consecutive ranks, by a heading such as "rank 0" or "ranks 1-3"."""
    share = len(plan.ranks) // max(1, len(plan.ranges))
    found = {}
    for phases, group in groupby(range(len(plan.ranks)), key=plan.ranks.__getitem__):
        first, *others = group
        blocks = plan.ranges[first // share] if plan.ranges else None
        column = Column(union(phases), peak(phases) / GIB, max(tracked[first].values()) if tracked else None, blocks)
        found[f"ranks {first}-{others[-1]}" if others else f"rank {first}"] = column
    return found
