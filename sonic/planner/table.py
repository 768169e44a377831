"""The planner's answer for people: a table of plans, the items of the chosen one, and what would help when nothing fits."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from sonic.planner.memory import GIB, ITEMS
from sonic.planner.plans import Plan
from sonic.planner.search import Planned, reason
from sonic.planner.training_plans import PlannedTraining


def show(found: Planned, tracked: Sequence[float] | None = None, *, untracked: str = "", console: Console | None = None) -> None:
    """Print the answer; `tracked` is what the chosen plan took on fake tensors, GiB per rank, `untracked` why that is not known
    although it was asked for."""
    work = found.work
    film = f"{work.model.name}, {work.width}x{work.height}, {work.tokens} tokens, {work.steps} steps"
    console = begin(found, film, console)
    console.print(_plans(found))
    console.print(_items(found.chosen, tracked))
    if untracked:
        console.print(f"not tracked: {untracked}")
    if not found.fits:
        peaks = [max(change.plan.peak_gib) for change in found.changes]
        end_in_need(found, peaks, "steps, size, length or plan", console=console)


def begin(found: Planned | PlannedTraining, what: str, console: Console | None) -> Console:
    """Print what was planned, on which hardware, and the notes; where."""
    console, hardware = console or Console(width=None if Console().is_terminal else 150), found.hardware
    console.print(f"{what} on {hardware.name}: {hardware.devices} x {hardware.usable_gib:g} GiB usable")
    for note in found.notes:
        console.print(f"[dim]{note}[/dim]")
    return console


def end_in_need(found: Planned | PlannedTraining, peaks: Sequence[float], tried: str, *, console: Console) -> None:
    """Print what is missing and the changes that would make it fit, each with its peak in GiB; `tried` = of what there are changes."""
    missing = found.chosen.missing_gib(found.hardware)
    console.print(f"[bold]nothing fits[/bold]: the least demanding plan, {found.chosen.name}, lacks {missing:.2f} GiB")
    for change, peak in zip(found.changes, peaks, strict=True):
        console.print(f"  would fit: {change.sentence} ({' '.join(change.knobs)}): {change.plan.name}, {peak:.2f} GiB")
    if not found.changes:
        console.print(f"  no single change of {tried} makes it fit; it needs more memory")


def _plans(found: Planned) -> Table:
    table = Table("plan", "fits", "GiB", "host GiB", "s/block", "frames/s", "first s", "why")
    for plan in found.plans:
        fits = plan.missing_gib(found.hardware) == 0
        figures = (plan.host / GIB, plan.seconds.total, plan.frames_per_second, plan.seconds.first)
        row = [plan.name, "yes" if fits else "no", f"{max(plan.peak_gib):.2f}", *(f"{figure:.2f}" for figure in figures)]
        table.add_row(*row, reason(plan, found.hardware), style="bold" if plan is found.chosen else None)
    return table


def _items(plan: Plan, tracked: Sequence[float] | None) -> Table:
    """Every rank of a plan, item by item."""
    ranks = _distinct(plan)
    table = Table("GiB", *ranks, title=f"{plan.name}, rank by rank")
    for item in ITEMS:
        sizes = [plan.ranks[first][item] / GIB for first in ranks.values()]
        if any(sizes):
            first = " (first)" if item.endswith("encoder") else ""
            table.add_row(item.replace("_", " ") + first, *(f"{size:.2f}" for size in sizes))
    table.add_row("predicted peak", *(f"{plan.peak_gib[first]:.2f}" for first in ranks.values()), style="bold")
    if tracked is not None:
        table.add_row("tracked peak", *(f"{tracked[first]:.2f}" for first in ranks.values()), style="bold")
        errors = [plan.peak_gib[first] / tracked[first] - 1 for first in ranks.values()]
        table.add_row("predicted / tracked - 1", *(f"{error:+.1%}" for error in errors))
    if plan.ranges:
        share = len(plan.ranks) // len(plan.ranges)
        spans = [plan.ranges[first // share] for first in ranks.values()]
        table.add_row("blocks", *(f"{span.start}..{span.stop - 1}" if len(span) else "none" for span in spans))
    return table


def _distinct(plan: Plan) -> dict[str, int]:
    """Ranks that differ, by a heading such as "rank 0" or "ranks 1-3"."""
    groups: list[list[int]] = []
    for rank, items in enumerate(plan.ranks):
        if groups and plan.ranks[groups[-1][0]] == items:
            groups[-1].append(rank)
        else:
            groups.append([rank])
    return {f"rank {group[0]}" if len(group) == 1 else f"ranks {group[0]}-{group[-1]}": group[0] for group in groups}
