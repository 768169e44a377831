"""The report of a sweep: one self-contained HTML page with a table, plots and synchronised videos; and the table as CSV."""

from __future__ import annotations

import base64
import csv
from collections import defaultdict
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from sonic.evaluation import sweep_plots
from sonic.evaluation.sweep import Cell
from sonic.evaluation.teacher_distance import Rows, with_distances
from sonic.system.files import written_temporary

OPENINGS = "openings"  # tracks of mouths, which no table shows


def write_report(cells: Sequence[Cell], folder: Path, *, title: str) -> Path:
    """Write report.html and report.csv to `folder`; returns the path of the HTML file."""
    rows = [(cell, figures) for cell in cells if (figures := cell.figures)]
    if all(OPENINGS in figures for _, figures in rows):
        rows = with_distances(rows)
    options = list(dict.fromkeys(option for cell in cells for option in cell.choices))
    names = [name for name in dict.fromkeys(name for _, figures in rows for name in figures) if name != OPENINGS]
    pictures = {
        "Figures over cost": sweep_plots.quality_over_cost(rows),
        "Training curves": sweep_plots.training_curves(cells),
        "Options and figures": sweep_plots.parallel_coordinates(rows),
    }
    plots = {heading: _url("image/svg+xml", svg.encode()) for heading, svg in pictures.items() if svg}
    template = jinja2.Environment(autoescape=True).from_string((resources.files("sonic.assets") / "sweep_report.html").read_text())
    shown = {"cells": cells, "rows": rows, "names": names, "options": options}
    page = template.render(title=title, plots=plots, videos=_videos(rows), in_words=_in_words, label=sweep_plots.label, **shown)
    with written_temporary(folder / "report.html") as partial:
        partial.write_text(page)
    with written_temporary(folder / "report.csv") as partial, partial.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow([*options, *(column for name in names for column in _columns(rows, name))])
        for cell, figures in rows:
            values = [value for name in names for value in _columns(rows, name, figures).values()]
            table.writerow([*(cell.choices.get(option, "") for option in options), *values])
    return folder / "report.html"


def _columns(rows: Rows, name: str, figures: dict[str, Any] | None = None) -> dict[str, Any]:
    """The columns that a figure has in the CSV, with their values in a row: mean and interval, or the value alone."""
    figure = (figures or {}).get(name, "")
    if not any(isinstance(its.get(name), dict) for _, its in rows):
        return {name: figure}
    width = sweep_plots.interval(figure)
    return {f"{name}_mean": figure and sweep_plots.mean(figure), f"{name}_ci95": "" if width is None else width}


def _in_words(figure: Any) -> str:
    """A figure in the table of the page."""
    if not isinstance(figure, dict):
        return f"{figure:.4g}" if isinstance(figure, float) else str(figure)
    width = sweep_plots.interval(figure)
    return f"{figure['mean']:.4g} " + (f"(one {figure['of']})" if width is None else f"± {width:.2g}")


def _videos(rows: Rows) -> list[list[tuple[str, str]]]:
    """For each clip, the name of every cell and the URL of its video, which is embedded in the page."""
    clips = defaultdict(list)
    for cell, _ in rows:
        for path in cell.folder.glob("videos_*/*.mp4"):
            clips[path.parent.name, path.name].append((cell.name, _url("video/mp4", path.read_bytes())))
    return [videos for _, videos in sorted(clips.items())]


def _url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
