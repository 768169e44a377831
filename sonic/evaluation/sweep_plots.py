"""Plots of a sweep's report as SVG: quality over cost, training curves, parallel coordinates."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from textwrap import fill
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sonic.evaluation.sweep import Cell
from sonic.evaluation.teacher_distance import DISTANCE, Rows

COSTS = ("train_seconds", "seconds_per_step", "seconds_per_frame")  # the first that a cell has
# end of a figure's name -> 1 = higher is better
BETTER = {"sync_correlation": 1, "dynamics_ratio": 0, "student/loss": -1, DISTANCE: -1, "peak_gib": -1}
LABELS = {DISTANCE: "mouth's distance from the teacher's", "dynamics_ratio": "mouth dynamics, 1 = true", "peak_gib": "peak GiB"}
WIDTH, ROW, LEGEND = 11, 3.2, 0.22  # inches: of a picture, a row of plots, a line of the legend
SPAN = 20  # the largest value over the least, from which an axis is logarithmic


def label(name: str) -> str:
    """A figure's name in words."""
    return LABELS.get(name, name.replace("_", " "))


def mean(figure: Any) -> Any:
    """The value of a figure, or its mean where it has several."""
    return figure["mean"] if isinstance(figure, dict) else figure


def interval(figure: Any) -> float | None:
    """Half the width of a figure's 95 % interval; None where a single value has none."""
    return figure["ci95"] if isinstance(figure, dict) and len(figure["clips"]) > 1 else None


def quality_over_cost(rows: Rows) -> str:
    """The figures of BETTER over the first of COSTS, with their intervals and the best cells of each cost joined; "" without any."""
    cost, names = _cost_and_figures(rows)
    if not cost or not names:
        return ""
    picture = _picture((len(names) + 1) // 2, len(rows))
    for place, name in enumerate(names, 1):
        axes = picture.add_subplot((len(names) + 1) // 2, min(2, len(names)), place)
        axes.set(xlabel=label(cost), ylabel=label(name), xscale=_scale(mean(its[cost]) for _, its in rows if cost in its))
        axes.margins(0.06, 0.15)
        sign, points = _better(name), []
        for cell, its in rows:
            if {name, cost} <= its.keys():
                x, y, fits = mean(its[cost]), mean(its[name]), its.get("fits") != "no"
                style = {"fmt": "o" if fits else "x", "color": _color(cell), "capsize": 3}
                axes.errorbar(x, y, interval(its[name]), label=_entry(cell), **style)
                axes.annotate(str(cell.number), (x, y), xytext=(5, 5), textcoords="offset points")
                points += [(x, -sign * y)] * (fits and bool(sign))
        best = [(x, -sign * y) for index, (x, y) in enumerate(sorted(points)) if all(y < other for _, other in sorted(points)[:index])]
        axes.plot([x for x, _ in best], [y for _, y in best], "--", color="grey", zorder=0)
    return _svg(picture, legend=True)


def training_curves(cells: Sequence[Cell]) -> str:
    """Every loss of all trainings, finished or not, over steps and over seconds; "" without any."""
    curves = [(cell, curve) for cell in cells for seed in cell.seeds if (curve := cell.curve(seed))]
    names = list(dict.fromkeys(name for _, curve in curves for line in curve for name in line if name.endswith("loss")))
    if not names:
        return ""
    picture = _picture(len(names), len(cells))
    for pair, name in zip(picture.subplots(len(names), 2, squeeze=False, sharey="row"), names, strict=True):
        pair[0].set_ylabel(label(name))
        scale = _scale(line[name] for _, curve in curves for line in curve if name in line)
        for axes, over in zip(pair, ("step", "train_seconds"), strict=True):
            axes.set(xlabel=label(over), yscale=scale)
            for cell, curve in curves:
                lines = [line for line in curve if name in line]
                style = {"color": _color(cell), "lw": 1, "label": _entry(cell)}
                axes.plot([line[over] for line in lines], [line[name] for line in lines], ".-", **style)
    return _svg(picture, legend=True)


def parallel_coordinates(rows: Rows) -> str:
    """A line for every cell through its options and figures, in the colour of its first figure; "" when there is nothing to compare."""
    options = dict.fromkeys(name for cell, _ in rows for name in cell.choices)
    options = [name for name in options if len({str(cell.choices.get(name)) for cell, _ in rows}) > 1]
    cost, names = _cost_and_figures(rows)
    figures = [*names, *([cost] if cost else [])]
    rows = [(cell, its) for cell, its in rows if all(name in its for name in figures)]
    if not options or not names or not rows:
        return ""
    picture = Figure(figsize=(WIDTH, ROW + 0.6), layout="constrained")
    axes = picture.subplots()
    columns = [_listed([cell.choices.get(name) for cell, _ in rows]) for name in options]
    columns += [_measured([mean(its[name]) for _, its in rows]) for name in figures]
    for x, (_, marks) in enumerate(columns):
        axes.axvline(x, color="grey", lw=0.8, zorder=0)
        for text, height in marks.items():
            axes.annotate(text, (x, height), xytext=(4, 3), textcoords="offset points", fontsize=9)
    for (cell, _), line in zip(rows, zip(*(heights for heights, _ in columns), strict=True), strict=True):
        axes.plot(range(len(line)), line, color=colormaps["viridis"](line[len(options)]), lw=1.5, alpha=0.8)
        axes.annotate(str(cell.number), (len(options), line[len(options)]), xytext=(-14, -3), textcoords="offset points", fontsize=9)
    axes.set_xticks(
        range(len(columns)), [fill(label(name), 12, break_long_words=False).replace(".", ".\n") for name in (*options, *figures)]
    )
    axes.set(yticks=[], xlim=(-0.2, len(columns) - 0.5))
    axes.spines[:].set_visible(False)
    return _svg(picture)


def _listed(values: Sequence[Any]) -> tuple[list[float], dict[str, float]]:
    """Heights between 0 and 1 of an option's values, each as far from the next, and the heights of its marks."""
    numbers = all(isinstance(value, int | float) for value in values)
    order = [str(value) for value in (sorted(set(values)) if numbers else sorted(set(map(str, values))))]
    marks = {text: index / max(1, len(order) - 1) for index, text in enumerate(order)}
    return [marks[str(value)] for value in values], marks


def _measured(values: Sequence[float]) -> tuple[list[float], dict[str, float]]:
    """Heights between 0 and 1 of a figure's values, and those of its marks, the least value and the largest."""
    low, high = min(values), max(values)
    return [(value - low) / ((high - low) or 1) for value in values], {f"{high:.4g}": float(high > low), f"{low:.4g}": 0.0}


def _scale(values: Iterable[float]) -> str:
    """The scale of an axis for these values."""
    ordered = sorted(values)
    return "log" if ordered and 0 < SPAN * ordered[0] < ordered[-1] else "linear"


def _cost_and_figures(rows: Rows) -> tuple[str, list[str]]:
    """The cost that the cells have, and their figures of BETTER in its order."""
    present = dict.fromkeys(name for _, its in rows for name in its)
    return next((name for name in COSTS if name in present), ""), [name for end in BETTER for name in present if name.endswith(end)]


def _better(name: str) -> int:
    return next(sign for end, sign in BETTER.items() if name.endswith(end))


def _entry(cell: Cell) -> str:
    """A cell in a legend."""
    return f"{cell.number}  {cell.name}"


def _color(cell: Cell) -> Iterable[float]:
    return colormaps["tab20"].colors[(cell.number - 1) % 20]


def _picture(plots: int, cells: int) -> Figure:
    """An empty picture for rows of plots and a legend of all cells."""
    return Figure(figsize=(WIDTH, ROW * plots + LEGEND * (cells + 1) // 2), layout="constrained")


def _svg(picture: Figure, *, legend: bool = False) -> str:
    """A picture as SVG, with a legend of what its axes have in common."""
    if legend:
        axes: Sequence[Axes] = picture.axes
        found = {text: handle for each in axes for handle, text in zip(*each.get_legend_handles_labels(), strict=True)}
        picture.legend(found.values(), found.keys(), loc="outside lower center", ncols=2, fontsize=9)
    svg = io.StringIO()
    picture.savefig(svg, format="svg")
    return svg.getvalue()
