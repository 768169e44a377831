"""The report of a sweep: one page with all figures, plots and videos, which needs no other files."""

from __future__ import annotations

import base64
import csv
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sweeping import config, sweep, write_report

from sonic.checkpoint.header import Header
from sonic.data.video import VideoWriter
from sonic.evaluation.sweep import Cell, cells_of
from sonic.evaluation.teacher_distance import DISTANCE, with_distances


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.sources = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]


@pytest.fixture
def report(tmp_path):
    made = config("grid={sampler.sample_steps: [2, 3, 4]}", "seeds=[1]")
    cells = sweep(made, tmp_path)
    for cell in cells:
        if cell.figures:
            (cell.folder / "videos_1").mkdir()
            with VideoWriter(cell.folder / "videos_1/clip_000.mp4", 64, 64, num_frames=100) as writer:
                writer.write(np.full((100, 64, 64, 3), 90, np.uint8))
    return write_report(cells, tmp_path)


def test_the_report_page_needs_no_other_files(report):
    page = Page(report.read_text())
    assert page.tags.count("img") == 2  # quality over cost, parallel coordinates
    assert page.tags.count("video") == 2
    assert page.tags.count("tr") == 3
    assert all(source.startswith("data:") for source in page.sources)
    embedded = [base64.b64decode(source.partition("base64,")[2]) for source in page.sources if source.startswith("data:video/mp4")]
    assert embedded == [path.read_bytes() for path in sorted(report.parent.rglob("*/clip_000.mp4"))]
    assert "three steps are not to be had" in report.read_text()
    assert "viewport" in report.read_text()


def test_the_table_is_written_as_csv(report):
    rows = list(csv.DictReader((report.parent / "report.csv").open()))
    assert [row["sampler.sample_steps"] for row in rows] == ["2", "4"]
    assert float(rows[0]["sync_correlation_mean"]) == pytest.approx(0.85 + 0.01)
    assert "teacher_distance_mean" not in rows[0]  # no cell is a teacher


def plots(page):
    """The plots of a report, as SVG."""
    sources = [source for source in Page(page.read_text()).sources if source.startswith("data:image/svg+xml")]
    return "".join(base64.b64decode(source.partition("base64,")[2]).decode() for source in sources)


def test_the_distance_of_a_student_is_from_the_teacher_with_most_steps(tmp_path):
    cells = sweep(config("grid={weights: [student, teacher], sampler.sample_steps: [1, 2, 4]}", "seeds=[1]"), tmp_path)
    page = write_report(cells, tmp_path)
    rows = {(row["weights"], row["sampler.sample_steps"]): row for row in csv.DictReader((tmp_path / "report.csv").open())}
    given = {key: float(row["teacher_distance_mean"]) for key, row in rows.items()}
    reference = np.array([0.0, 0.25, 0.0, -1.0])
    assert given["teacher", "4"] == given["student", "4"] == 0.0
    assert given["student", "1"] == pytest.approx(0.75 / 2 / reference.std(), abs=1e-6) and given["student", "2"] < given["student", "1"]
    assert "distance from the teacher's" in plots(page)


def test_a_student_in_a_file_is_held_against_the_teacher_that_its_file_names(tmp_path):
    for name, base in (("one", ""), ("two", ""), ("student", "one.safetensors")):
        sampler = {"sample_steps": 1} if base else {}
        header = Header({}, "dmd" if base else "flow_match", 60.0, sampler, {}, base, "")
        save_file({"a": torch.zeros(1)}, tmp_path / f"{name}.safetensors", header.metadata())
    save_file({"a": torch.zeros(1)}, tmp_path / "old.safetensors")  # says nothing: whole weights
    one, two, student, old = (str(tmp_path / f"{name}.safetensors") for name in ("one", "two", "student", "old"))
    openings = {(one, 1): [0.0, 2.0], (one, 40): [0.0, 1.0], (two, 40): [0.0, 4.0], (student, 1): [0.0, 1.5], (old, 50): [0.0, 9.0]}
    cells = [
        Cell(number, "evaluate", {"weights": file, "sampler.sample_steps": steps}, [], [], [], tmp_path, [1])
        for number, (file, steps) in enumerate(openings)
    ]
    found = with_distances([(cell, {"openings": [track]}) for cell, track in zip(cells, openings.values(), strict=True)])
    distances = [figures[DISTANCE]["mean"] for _, figures in found]
    assert distances == pytest.approx([np.sqrt(0.5) / 0.5, 0, 0, np.sqrt(0.125) / 0.5, 0])
    assert [figures.get("objective") for _, figures in found] == ["flow_match"] * 3 + ["dmd", None]
    assert found[3][1]["training_minutes"] == 60


def test_every_plot_names_its_axis_and_the_legend_every_cell(report):
    drawn = plots(report)
    assert all(words in drawn for words in ("sync correlation", "mouth dynamics", "peak GiB", "sample_steps=2", "sample_steps=4"))
    assert "distance from the teacher's" not in drawn and "sample_steps=3" not in drawn


# click the button, read the state, click again and read it again
PROBE = """
const look=()=>({fits:document.body.scrollWidth<=innerWidth,paused:[...document.querySelectorAll('video')].map(v=>v.paused)});
addEventListener('load',()=>{const button=document.querySelector('.row button');button.click();
const playing=look();button.click();document.title=JSON.stringify([playing,look()]);});
"""


def test_a_button_starts_and_stops_all_videos_of_a_row_and_the_page_fits_a_phone(report, tmp_path):
    browser = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no chromium on this machine; .ci/run installs it where it may")
    page = tmp_path / "probe.html"
    page.write_text(report.read_text().replace("</body>", f"<script>{PROBE}</script></body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=400,800", "--virtual-time-budget=5000", "--dump-dom"]
    options.append("--autoplay-policy=no-user-gesture-required")  # a script's click is no person's
    done = subprocess.run([browser, *options, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    playing, stopped = json.loads(re.search(r"<title>(.*?)</title>", done.stdout)[1])
    assert playing == {"fits": True, "paused": [False, False]}
    assert stopped == {"fits": True, "paused": [True, True]}


def test_the_report_has_curves_of_all_trainings_and_lines_through_options_and_figures(tmp_path):
    cells = cells_of(config("job=train", "score=false", "seeds=[1]", "grid={optim.lr: [0.1, 0.2], objective.learn.rank: [4]}"), tmp_path)
    for number, cell in enumerate(cells):
        lines = [{"step": step, "student/loss": 0.5 / step + number, "perf/seconds_per_step": 2.0} for step in (1, 2, 4)]
        cell.run_folder(1).mkdir(parents=True)
        (cell.run_folder(1) / "scalars.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    cells[0].result_file(1).write_text("{}")
    cells[1].failure_file(1).write_text("seed 1: the loss exploded\n")
    page = write_report(cells, tmp_path)
    assert cells[0].figures["train_seconds"]["clips"] == [8.0] and cells[0].curve(1)[1]["train_seconds"] == 4.0
    drawn, text = plots(page), page.read_text()
    assert all(words in drawn for words in ("student/loss", "train seconds", "lr=0.1", "lr=0.2"))  # of the failed one too
    assert "0.125 (one seed)" in text and "the loss exploded" in text
    rows = list(csv.DictReader((tmp_path / "report.csv").open()))
    assert [(row["student/loss_mean"], row["student/loss_ci95"]) for row in rows] == [("0.125", "")]


def test_parallel_coordinates_pass_through_every_option_that_varies(tmp_path):
    pytest.importorskip("matplotlib")
    from sonic.evaluation.sweep_plots import parallel_coordinates

    cells = sweep(config("grid={sampler.sample_steps: [2, 4], weights: [teacher, student], decode.queue: [2]}", "seeds=[1]"), tmp_path)
    drawn = parallel_coordinates([(cell, cell.figures) for cell in cells])
    assert all(f"<!-- {words} -->" in drawn for words in ("weights", "teacher", "student", "0.86", "0.885"))
    assert "queue" not in drawn
