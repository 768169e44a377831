"""Sweeps: every cell is scored once per seed, failures are reported and retried on request, and the report needs no other files."""

from __future__ import annotations

import _thread
import base64
import csv
import json
import os
import re
import shutil
import subprocess
import threading
import time
from html.parser import HTMLParser

import fake_score
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from wandb_recorder import record_wandb

from sonic.checkpoint.header import Header
from sonic.cli import Entry, compose
from sonic.commands import ablate_command
from sonic.data.video import VideoWriter
from sonic.evaluation import sweep as sweeps
from sonic.evaluation.sweep import Cell, cells_of, run_jobs
from sonic.evaluation.sweep_config import AblateConfig
from sonic.evaluation.teacher_distance import DISTANCE, with_distances
from sonic.training.log import log_cells
from sonic.training.train_config import LogConfig

ENTRY = Entry("ablate", AblateConfig, collections=("ablate",))
GRID = "grid={sampler.sample_steps: [2, 4], weights: [teacher]}"


def sweep(made, folder, score=fake_score.score):
    """The cells of a sweep that evaluates with a stand-in."""
    pytest.importorskip("submitit")
    pytest.importorskip("matplotlib")
    return sweeps.sweep(made, folder, score)


def write_report(cells, folder):
    pytest.importorskip("matplotlib")
    from sonic.evaluation.sweep_report import write_report

    return write_report(cells, folder, title="steps")


def config(*argv):
    return compose(ENTRY, ["clips=3", "num_videos=0", "seeds=[1,2]", "jobs=2", *argv])


def written(cells):
    """When each evaluation was made."""
    return {file: file.stat().st_mtime_ns for cell in cells for file in cell.folder.glob("seed_*")}


def test_a_cell_runs_with_its_choices_once_for_every_seed(tmp_path):
    cell = cells_of(config(GRID), tmp_path)[1]
    first, second = (cell.command(seed) for seed in cell.seeds)
    assert {"sampler.sample_steps=4", "weights=teacher", "eval.clips=3", "eval.seed=1", "+preset=fast_preview"} <= set(first)
    assert "eval.seed=2" in second
    assert cell.name == "sample_steps=4, weights=teacher"


def test_a_cell_gets_only_the_machine_options_that_were_set(tmp_path):
    given = cells_of(config(GRID, "run.threads=1", "run.dtype=bfloat16"), tmp_path)[0].options
    assert "run.threads=1" in given and "run.dtype=bfloat16" in given and not any(item.startswith("run.device") for item in given)
    assert not any(item.startswith("run.") for item in cells_of(config(GRID), tmp_path)[0].options)


def test_the_options_of_a_cell_are_those_of_the_command_evaluate(tmp_path):
    cell = cells_of(config(GRID, "run.threads=1"), tmp_path)[0]
    made = compose(ablate_command.EVALUATE, cell.command(2))
    assert (made.sampler.sample_steps, made.eval.seed, made.eval.clips, made.run.threads) == (2, 2, 3, 1)
    assert made.json == str(cell.result_file(2))


def test_combinations_can_be_left_out(tmp_path):
    made = config(
        "grid={weights: [student, teacher], sampler.sample_steps: [2, 40]}", "exclude=[{weights: student, sampler.sample_steps: 40}]"
    )
    assert [cell.name for cell in cells_of(made, tmp_path)] == [
        "weights=student, sample_steps=2", "weights=teacher, sample_steps=2", "weights=teacher, sample_steps=40",
    ]  # fmt: skip


def test_finished_evaluations_are_kept_and_missing_ones_made(tmp_path):
    cells = sweep(config(GRID), tmp_path)
    assert [len(cell.figures["sync_correlation"]["clips"]) for cell in cells] == [6, 6]
    before = written(cells)
    cells = sweep(config(GRID, "seeds=[1,2,3]"), tmp_path)
    assert [len(cell.figures["sync_correlation"]["clips"]) for cell in cells] == [9, 9]
    assert {file: when for file, when in written(cells).items() if file in before} == before


def test_a_cell_with_other_options_than_before_is_scored_again_beside_the_old_results(tmp_path):
    old = sweep(config(GRID), tmp_path)
    new = sweep(config(GRID, "clips=4"), tmp_path)
    assert [len(cell.figures["sync_correlation"]["clips"]) for cell in (*old, *new)] == [6, 6, 8, 8]


def test_failed_cells_are_reported_and_retried_with_retry_true(tmp_path, monkeypatch):
    submitit = pytest.importorskip("submitit")
    monkeypatch.setattr(submitit.Job, "_results_timeout_s", 0.1)  # for which it looks for the result of a lost process
    grid = "grid={sampler.sample_steps: [2, 3, 13]}"
    good, bad, killed = cells = sweep(config(grid, "seeds=[1]"), tmp_path)
    assert good.figures and not bad.figures and not killed.figures
    assert "three steps are not to be had" in bad.failure and "has not produced any output" in killed.failure
    before = written(cells)
    assert written(sweep(config(grid, "seeds=[1]"), tmp_path)) == before
    after = written(sweep(config(grid, "seeds=[1]", "retry=true"), tmp_path))
    assert [after[file] == when for file, when in before.items()] == ["failed" not in file.name for file in before]


def test_an_interruption_stops_what_runs_and_the_same_command_scores_the_rest(tmp_path):
    made = config("grid={sampler.sample_steps: [5]}", "jobs=1")
    (cell,) = cells_of(made, tmp_path)

    def interrupt():
        while not ((cell.folder / "waits").is_file() and (cell.folder / "waits").read_text()):
            time.sleep(0.05)
        _thread.interrupt_main()

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        sweep(made, tmp_path, fake_score.score_until_stopped)
    assert cell.figures is None and not cell.failure
    before, process = written([cell]), int((cell.folder / "waits").read_text())
    assert [file.name for file in before] == ["seed_1.json"]
    deadline = time.monotonic() + 20
    while os.path.exists(f"/proc/{process}") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{process}")
    sweep(made, tmp_path)
    assert cell.figures["sync_correlation"]["clips"] == pytest.approx([0.89] * 3 + [0.9] * 3)
    assert before.items() <= written([cell]).items()


class Ends:
    """A job that ends at the second look, with an error or without."""

    def __init__(self, error=None):
        self.looks, self.error, self.cancelled = 0, error, False

    def done(self):
        self.looks += 1
        return self.looks > 1

    def exception(self):
        return self.error

    def cancel(self):
        self.cancelled = True


def test_no_more_than_the_asked_number_run_at_once_and_those_that_run_are_cancelled_at_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr(sweeps, "POLL_S", 0)
    cells, started = cells_of(config("grid={sampler.sample_steps: [1, 2, 3]}", "seeds=[1]"), tmp_path), []

    def submit(command):
        assert sum(job.looks < 2 for job in started) < 2
        started.append(Ends(ValueError("no") if "sampler.sample_steps=2" in command else None))
        return started[-1]

    found = list(run_jobs([(cell, 1) for cell in cells], submit, 2))
    assert [(cell.choices["sampler.sample_steps"], str(error)) for cell, _, error in found] == [(1, "None"), (2, "no"), (3, "None")]
    running = run_jobs([(cell, 1) for cell in cells], submit, 2)
    next(running)
    running.close()
    assert [job.cancelled for job in started[3:]] == [False, True]


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
    assert page.tags.count("img") == 1
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
    (source,) = (source for source in Page(page.read_text()).sources if source.startswith("data:image/svg+xml"))
    return base64.b64decode(source.partition("base64,")[2]).decode()


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
    cells = [Cell({"weights": file, "sampler.sample_steps": steps}, [], tmp_path, [1]) for file, steps in openings]
    found = with_distances([(cell, {"openings": [track]}) for cell, track in zip(cells, openings.values(), strict=True)])
    distances = [figures[DISTANCE]["mean"] for _, figures in found]
    assert distances == pytest.approx([np.sqrt(0.5) / 0.5, 0, 0, np.sqrt(0.125) / 0.5, 0])
    assert [figures.get("objective") for _, figures in found] == ["flow_match"] * 3 + ["dmd", None]
    assert found[3][1]["training_minutes"] == 60


def test_every_plot_names_its_axis_and_the_legend_every_cell(report):
    drawn = plots(report)
    assert all(words in drawn for words in ("sync correlation", "mouth dynamics", "peak memory", "sample_steps=2", "sample_steps=4"))
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


def test_the_cells_are_one_group_in_wandb(tmp_path, monkeypatch):
    runs, cells = record_wandb(monkeypatch), sweep(config(GRID), tmp_path)
    log_cells(cells, tmp_path, LogConfig(wandb="offline"), group="mine")
    assert [run.keywords["name"] for run in runs] == [cell.name for cell in cells]
    for run, cell in zip(runs, cells, strict=True):
        assert run.keywords["group"] == "mine" and run.choices == cell.choices and run.exit_code == 0
        ((_, figures),) = run.logged
        assert figures["eval/sync_correlation"] == cell.figures["sync_correlation"]["mean"]


@pytest.mark.parametrize(
    ("typed", "given"),
    [
        ("grid={}", "grid is empty"),
        ("grid={seed: 3}", "not a list"),
        ("jobs=0", "at least 1"),
        ("minutes=0", "at least 1"),
        ("engine=slrm", "choose one of"),
        ("exclude=[{steps: 4}]", "does not name options"),
    ],
)
def test_an_impossible_sweep_is_refused(typed, given):
    with pytest.raises(ValueError, match=given):
        compose(ENTRY, [GRID, typed])


@pytest.mark.parametrize(("engine", "packages"), [("local", "submitit matplotlib"), ("ray", "submitit matplotlib ray")])
def test_missing_packages_are_named_before_anything_is_scored(engine, packages, tmp_path, monkeypatch):
    monkeypatch.setattr(sweeps, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"run: pip install {packages}$"):
        sweeps.sweep(config(GRID, f"engine={engine}"), tmp_path, fake_score.score)
    assert not [*tmp_path.iterdir()]


def test_a_lost_ray_worker_fails_its_cell_and_not_the_sweep(tmp_path):
    ray = pytest.importorskip("ray")
    try:
        good, bad = sweep(config("grid={sampler.sample_steps: [2, 13]}", "engine=ray", "seeds=[1]"), tmp_path)
    finally:
        ray.shutdown()
    assert good.figures and not bad.figures
    assert "died" in bad.failure


def test_grid_items_of_the_command_line_are_gathered():
    argv = ["grid.sampler.sample_steps=[2,3]", "grid.video.size=[64x64,128x128]", "clips=2", "num_videos=1"]
    made = compose(ablate_command.ENTRY, argv)
    assert made.grid == {"sampler.sample_steps": [2, 3], "video.size": ["64x64", "128x128"]}
    assert json.dumps(made.grid)
