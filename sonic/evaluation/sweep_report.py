"""The report of a sweep: one self-contained HTML page with a table, plots and synchronised videos; and the table as CSV."""

from __future__ import annotations

import base64
import csv
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from matplotlib import colormaps, cycler
from matplotlib.figure import Figure

from sonic.evaluation.metrics import in_words
from sonic.evaluation.sweep import FIGURES, Cell
from sonic.evaluation.teacher_distance import DISTANCE, Rows, with_distances
from sonic.system.files import written_temporary

COST = "seconds_per_frame"
PLOTS = {  # figure -> label of its axis, over the cost
    "sync_correlation": "sync correlation",
    "dynamics_ratio": "mouth dynamics, 1 = true",
    DISTANCE: "mouth's distance from the teacher's",
    "peak_rss_gib": "peak memory, GiB",
}


def write_report(cells: Sequence[Cell], folder: Path, *, title: str) -> Path:
    """Write report.html and report.csv to `folder`; returns the path of the HTML file."""
    rows = with_distances([(cell, figures) for cell in cells if (figures := cell.figures)])
    names = [name for name in (*FIGURES, DISTANCE) if any(name in figures for _, figures in rows)]
    template = jinja2.Environment(autoescape=True).from_string((resources.files("sonic.assets") / "sweep_report.html").read_text())
    page = template.render(title=title, cells=cells, rows=rows, names=names, plots=_plots(rows), videos=_videos(rows), in_words=in_words)
    with written_temporary(folder / "report.html") as partial:
        partial.write_text(page)
    with written_temporary(folder / "report.csv") as partial, partial.open("w", newline="") as file:
        options = list(dict.fromkeys(option for cell in cells for option in cell.choices))
        table = csv.writer(file)
        table.writerow([*options, *(f"{name}_{part}" for name in names for part in ("mean", "ci95")), "peak_rss_gib"])
        for cell, figures in rows:
            values = [figures.get(name, {}).get(part, "") for name in names for part in ("mean", "ci95")]
            table.writerow([*(cell.choices.get(option, "") for option in options), *values, figures["peak_rss_gib"]])
    return folder / "report.html"


def _plots(rows: Rows) -> str:
    """The figures of PLOTS that the cells have over their cost, as the URL of an SVG; the first one with its Pareto-optimal cells."""
    shown = [name for name in PLOTS if any(name in figures for _, figures in rows)]
    if not shown:
        return ""
    picture = Figure(figsize=(10, 4 * len(shown)), layout="constrained")
    for axes, name in zip(picture.subplots(len(shown)), shown, strict=True):
        axes.set(xlabel="seconds per frame", ylabel=PLOTS[name], prop_cycle=cycler(color=colormaps["tab20"].colors))
        points = [(_mean(figures[COST]), _mean(figures[name]), number) for number, (_, figures) in enumerate(rows, 1) if name in figures]
        for x, y, number in points:
            axes.plot(x, y, "o", label=f"{number}  {rows[number - 1][0].name}")
            axes.annotate(str(number), (x, y), xytext=(5, 5), textcoords="offset points")
        if name == shown[0]:
            picture.legend(loc="outside lower center", ncols=2)
            best = [(x, y) for x, y, _ in sorted(points) if all(y > other for cost, other, _ in points if cost < x)]
            axes.plot(*zip(*best, strict=True), "--", color="grey", zorder=0)
    svg = io.BytesIO()
    picture.savefig(svg, format="svg")
    return _url("image/svg+xml", svg.getvalue())


def _videos(rows: Rows) -> list[list[tuple[str, str]]]:
    """For each clip, the name of every cell and the URL of its video, which is embedded in the page."""
    clips = defaultdict(list)
    for cell, _ in rows:
        for path in cell.folder.glob("videos_*/*.mp4"):
            clips[path.parent.name, path.name].append((cell.name, _url("video/mp4", path.read_bytes())))
    return [videos for _, videos in sorted(clips.items())]


def _mean(figure: Any) -> float:
    return figure["mean"] if isinstance(figure, Mapping) else figure


def _url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
