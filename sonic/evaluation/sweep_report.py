"""The report of a sweep: one self-contained HTML page with a table, plots and synchronised videos; and the table as CSV."""

from __future__ import annotations

import base64
import csv
import html
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from sonic.evaluation.sweep import FIGURES, Cell
from sonic.evaluation.teacher_distance import DISTANCE, with_distances

WIDTH, HEIGHT, MARGIN = 460, 300, 52
COLOURS = ("#c2543d", "#3d6fc2", "#3f9b62", "#a05fc0", "#c29a3d", "#4aa3a8")
MARK, LINE = 4.5, 13
STYLE = """
:root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:auto;padding:1rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}td,th{padding:.3rem .7rem;text-align:right;border-bottom:1px solid #8885}
th:first-child,td:first-child{text-align:left}.wide{overflow-x:auto}.plots{display:flex;flex-wrap:wrap;gap:1rem}
svg{max-width:100%;height:auto;background:#fff;border:1px solid #8885}.videos{display:flex;gap:.6rem;overflow-x:auto;padding-bottom:.5rem}
figure{margin:0;flex:0 0 auto}video{width:11rem;height:11rem;background:#000}figcaption{font-size:.8rem;max-width:11rem}
h1{overflow-wrap:anywhere}button{font:inherit;padding:.2rem .9rem}pre{overflow-x:auto;font-size:.8rem}
"""
SCRIPT = """
for(const row of document.querySelectorAll('.row')){const all=[...row.querySelectorAll('video')];
row.querySelector('button').onclick=()=>{const go=all[0].paused;for(const v of all){v.currentTime=all[0].currentTime;v.muted=v!==all[0];
if(go)v.play();else v.pause();}};}
"""


def write_report(cells: Sequence[Cell], folder: Path, *, title: str) -> Path:
    """Write report.html and report.csv to `folder`; returns the path of the HTML file."""
    finished = [(cell, figures) for cell in cells if (figures := cell.figures)]
    figures = with_distances([(cell.choices, measured) for cell, measured in finished])
    done = [(cell, measured) for (cell, _), measured in zip(finished, figures, strict=True)]
    _write_csv(done, folder / "report.csv")
    failed = [cell for cell in cells if cell.failure]
    parts = [f"<h1>{html.escape(title)}</h1><p>{len(done)} of {len(cells)} cells are finished.</p>", _table(done)]
    if done:
        parts.append(f'<h2>Cost and quality</h2><div class="plots">{"".join(_plots(done))}</div>')
        parts.append(f"<h2>Videos</h2><p>Each row has the same portrait and voice.</p>{_videos([cell for cell, _ in done])}")
    if failed:
        failures = "".join(f"<h3>{html.escape(cell.name)}</h3><pre>{html.escape(cell.failure)}</pre>" for cell in failed)
        parts.append(f"<h2>Failed</h2>{failures}")
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    page = f"<!doctype html><html lang=en><head>{head}<title>{html.escape(title)}</title><style>{STYLE}</style></head>"
    page += f"<body>{''.join(parts)}<script>{SCRIPT}</script></body></html>\n"
    target = folder / "report.html"
    partial = target.with_suffix(".partial")
    partial.write_text(page)
    partial.rename(target)
    return target


def _table(done: Sequence[tuple[Cell, dict[str, Any]]]) -> str:
    names = _figures_of(done)
    heads = "".join(f"<th>{name.replace('_', ' ')}</th>" for name in ("cell", *names, "peak GiB"))
    rows = []
    for cell, figures in done:
        shown = (f"{figures[name]['mean']:.3f} ± {figures[name]['ci95']:.3f}" if name in figures else "" for name in names)
        values = "".join(f"<td>{value}</td>" for value in shown)
        rows.append(f"<tr><td>{html.escape(cell.name)}</td>{values}<td>{figures['peak_rss_gib']:.2f}</td></tr>")
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _figures_of(done: Sequence[tuple[Cell, dict[str, Any]]]) -> tuple[str, ...]:
    """Names of the metrics of all cells, including the distance from the teacher if any cell has one."""
    return (*FIGURES, *[DISTANCE] * any(DISTANCE in figures for _, figures in done))


def _write_csv(done: Sequence[tuple[Cell, dict[str, Any]]], path: Path) -> None:
    options = list(dict.fromkeys(option for cell, _ in done for option in cell.choices))
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        names = _figures_of(done)
        writer.writerow([*options, *(f"{name}_{part}" for name in names for part in ("mean", "ci95")), "peak_rss_gib"])
        for cell, figures in done:
            values = [figures.get(name, {}).get(part, "") for name in names for part in ("mean", "ci95")]
            writer.writerow([*(cell.choices.get(option, "") for option in options), *values, figures["peak_rss_gib"]])


def _plots(done: Sequence[tuple[Cell, dict[str, Any]]]) -> list[str]:
    mean = lambda name: lambda figures: figures[name]["mean"]  # noqa: E731
    cost, memory = mean("seconds_per_frame"), lambda figures: figures["peak_rss_gib"]
    taught = [(cell, figures) for cell, figures in done if DISTANCE in figures]
    return [
        _scatter(done, cost, mean("sync_correlation"), labels=("seconds per frame", "sync correlation"), pareto=True),
        _scatter(done, cost, mean("dynamics_ratio"), labels=("seconds per frame", "mouth dynamics, 1 = true")),
        *([_scatter(taught, cost, mean(DISTANCE), labels=("seconds per frame", "mouth's distance from the teacher's"))] if taught else []),
        _scatter(done, cost, memory, labels=("seconds per frame", "peak memory, GiB")),
    ]


def _scatter(
    done: Sequence[tuple[Cell, dict[str, Any]]],
    across: Callable[[dict], float],
    up: Callable[[dict], float],
    *,
    labels: tuple[str, str],
    pareto: bool = False,
) -> str:
    """A scatter plot as SVG with a name at every point, and with `pareto` the line of the Pareto-optimal points."""
    points = [(across(figures), up(figures), cell.name) for cell, figures in done]
    pixel_x, pixel_y = _scale([x for x, _, _ in points], MARGIN, WIDTH - 16), _scale([y for _, y, _ in points], HEIGHT - MARGIN, 16)
    drawn = []
    if pareto:
        best = [(x, y) for x, y, _ in sorted(points) if all(y > other for one, other, _ in points if one < x)]
        line = " ".join(f"{pixel_x(x):.1f},{pixel_y(y):.1f}" for x, y in best)
        drawn.append(f'<polyline points="{line}" fill="none" stroke="#888" stroke-dasharray="4 3"/>')
    heights = _spaced([pixel_y(y) for _, y, _ in points])
    for number, (x, y, name) in enumerate(points):
        left, top, colour = pixel_x(x), pixel_y(y), COLOURS[number % len(COLOURS)]
        side = ("end", -8) if left > WIDTH * 0.6 else ("start", 8)
        drawn.append(f'<circle cx="{left:.1f}" cy="{top:.1f}" r="{MARK}" fill="{colour}"><title>{html.escape(name)}</title></circle>')
        drawn.append(
            f'<text x="{left + side[1]:.1f}" y="{heights[number] + 4:.1f}" fill="{colour}" '
            f'text-anchor="{side[0]}">{html.escape(name)}</text>'
        )
    ends = [(min(v), max(v)) for v in zip(*((x, y) for x, y, _ in points), strict=True)]
    ticks = [f'<text x="{pixel_x(v):.1f}" y="{HEIGHT - MARGIN + 16}" text-anchor="middle">{v:.3g}</text>' for v in dict.fromkeys(ends[0])]
    ticks += [f'<text x="{MARGIN - 6}" y="{pixel_y(v) + 4:.1f}" text-anchor="end">{v:.3g}</text>' for v in dict.fromkeys(ends[1])]
    axes = f'<path d="M{MARGIN} 8V{HEIGHT - MARGIN}H{WIDTH - 8}" fill="none" stroke="#333"/>'
    names = f'<text x="{WIDTH / 2}" y="{HEIGHT - 10}" text-anchor="middle">{labels[0]}</text>'
    names += f'<text transform="translate(14 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">{labels[1]}</text>'
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    return f'<svg {size} font-size="11" font-family="sans-serif" fill="#222">{axes}{"".join(ticks + drawn)}{names}</svg>'


def _spaced(heights: Sequence[float]) -> list[float]:
    """Move heights apart until a line of text fits between any two."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    heights_out = list(heights)
    for before, after in zip(order, order[1:], strict=False):
        heights_out[after] = max(heights_out[after], heights_out[before] + LINE)
    over = max(0.0, max(heights_out) - (HEIGHT - MARGIN - LINE))
    return [height - over for height in heights_out]


def _scale(values: Sequence[float], first: float, last: float) -> Callable[[float], float]:
    """A function from values to pixel positions, with a margin on both sides."""
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 0.5 * abs(high) or 1.0
    return lambda value: first + (value - low + margin) / (high - low + 2 * margin) * (last - first)


def _videos(cells: Sequence[Cell]) -> str:
    """A row of videos for each clip, one for each cell with the cell's name; the videos are embedded in the page."""
    files = ((number, path) for number, cell in enumerate(cells) for path in cell.folder.glob("videos_*/*.mp4"))
    by_clip = sorted((f"{path.parent.name}/{path.stem}", number, path) for number, path in files)
    rows = []
    for _, same in groupby(by_clip, key=lambda item: item[0]):
        videos = "".join(
            f'<figure><video playsinline preload="auto" src="data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}">'
            f"</video><figcaption>{html.escape(cells[number].name)}</figcaption></figure>"
            for _, number, path in same
        )
        rows.append(f'<section class="row"><button>play / pause</button><div class="videos">{videos}</div></section>')
    return "".join(rows)
