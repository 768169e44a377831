"""Sweeps: every cell is scored once, failures are reported and retried on request, and the report needs no other files."""

from __future__ import annotations

import base64
import csv
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from wandb_recorder import record_wandb

from sonic.cli import Entry, compose
from sonic.commands import ablate_command
from sonic.data.video import VideoWriter
from sonic.evaluation import sweep as sweeps
from sonic.evaluation.sweep import FIGURES, cells_of, commands, sweep
from sonic.evaluation.sweep_config import AblateConfig
from sonic.evaluation.sweep_report import write_report
from sonic.training.log import log_cells
from sonic.training.train_config import LogConfig

ENTRY = Entry("ablate", AblateConfig, collections=("ablate",))
GRID = "grid={sampler.sample_steps: [2, 4], weights: [teacher]}"
# a fast stand-in for the scoring program: figures computed from its arguments, failure for three steps, and for five
# what a test puts there
SCORER = """
import json, sys
told = dict(item.split("=", 1) for item in sys.argv[1:] if "=" in item)
steps = int(told["sampler.sample_steps"])
if steps == 3:
    sys.exit("three steps are not to be had")
if steps == 5 and told["eval.seed"] == "2":
    {stop}
clips = [0.9 - 0.1 / steps + 0.01 * int(told["eval.seed"])] * int(told["eval.clips"])
names = {names}
tracks = [[0.0, 1.0 / steps, 0.0, -1.0]] * len(clips)
found = {{"peak_rss_gib": 0.5 + steps / 10, "openings": tracks, **{{name: {{"clips": clips}} for name in names}}}}
json.dump(found, open(told["json"], "w"))
"""


@pytest.fixture
def scorer(tmp_path, monkeypatch):
    program = tmp_path / "scorer.py"
    program.write_text(SCORER.format(names=FIGURES, stop="pass"))
    monkeypatch.setattr(sweeps, "PROGRAM", [sys.executable, str(program)])
    return program


def config(*argv):
    return compose(ENTRY, ["clips=3", "num_videos=0", "seeds=[1,2]", *argv])


def test_a_cell_runs_with_its_choices_once_for_every_seed(tmp_path):
    made = config(GRID)
    cell = cells_of(made, tmp_path)[1]
    first, second = commands(made, cell)
    assert {"sampler.sample_steps=4", "weights=teacher", "eval.clips=3", "eval.seed=1", "+preset=fast_preview"} <= set(first)
    assert "eval.seed=2" in second
    assert cell.name == "sample_steps=4, weights=teacher"


def test_a_cell_gets_only_the_machine_options_that_were_set(tmp_path):
    given = commands(config(GRID, "run.threads=1", "run.dtype=bfloat16"), cells_of(config(GRID), tmp_path)[0])[0]
    assert "run.threads=1" in given and "run.dtype=bfloat16" in given and not any(item.startswith("run.device") for item in given)
    assert not any(item.startswith("run.") for item in commands(config(GRID), cells_of(config(GRID), tmp_path)[0])[0])


def test_combinations_can_be_left_out(tmp_path):
    made = config(
        "grid={weights: [student, teacher], sampler.sample_steps: [2, 40]}", "exclude=[{weights: student, sampler.sample_steps: 40}]"
    )
    assert [cell.name for cell in cells_of(made, tmp_path)] == [
        "weights=student, sample_steps=2", "weights=teacher, sample_steps=2", "weights=teacher, sample_steps=40",
    ]  # fmt: skip


def test_finished_cells_are_not_scored_again(scorer, tmp_path):
    made = config(GRID)
    cells = sweep(made, tmp_path)
    assert [len(cell.figures["sync_correlation"]["clips"]) for cell in cells] == [6, 6]
    times = [(cell.folder / "figures.json").stat().st_mtime_ns for cell in cells]
    assert times == [(cell.folder / "figures.json").stat().st_mtime_ns for cell in sweep(made, tmp_path)]


def test_a_cell_with_other_options_than_before_is_scored_again(scorer, tmp_path, caplog):
    cells = sweep(config(GRID), tmp_path)
    (cells[1].folder / "arguments.json").unlink()  # as in cells of older versions, without a record of their options
    with caplog.at_level("INFO", logger="sonic.training"):
        cells = sweep(config(GRID, "clips=4"), tmp_path)
    assert [len(cell.figures["sync_correlation"]["clips"]) for cell in cells] == [8, 6]
    assert "sample_steps=2, weights=teacher was scored with other options" in caplog.text and caplog.text.count("with other options") == 1
    assert len(json.loads((cells[0].folder.with_name(f"left_{cells[0].folder.name}") / "seed_1.json").read_text())["openings"]) == 3


def test_failed_cells_are_reported_and_retried_with_retry_true(scorer, tmp_path):
    made = config("grid={sampler.sample_steps: [2, 3]}", "jobs=2")
    good, bad = sweep(made, tmp_path)
    assert good.figures and not bad.figures
    assert "three steps are not to be had" in bad.failure
    before = (bad.folder / "log.txt").stat().st_mtime_ns
    sweep(made, tmp_path)
    assert (bad.folder / "log.txt").stat().st_mtime_ns == before
    sweep(config("grid={sampler.sample_steps: [2, 3]}", "retry=true"), tmp_path)
    assert (bad.folder / "log.txt").stat().st_mtime_ns != before


@pytest.mark.parametrize("stop", ["sys.exit(130)", "__import__('os').kill(__import__('os').getpid(), 2)"])
def test_a_stopped_cell_is_scored_by_the_same_command_with_its_present_options(scorer, stop, tmp_path, caplog):
    healthy = scorer.read_text()
    scorer.write_text(SCORER.format(names=FIGURES, stop=stop))
    grid = "grid={sampler.sample_steps: [5]}"
    (cell,) = sweep(config(grid), tmp_path)
    assert cell.figures is None and not cell.failure and "sample_steps=5 was stopped" in caplog.text
    assert [path.name for path in cell.folder.glob("seed_*")] == ["seed_1.json"]
    scorer.write_text(healthy)
    (cell,) = sweep(config(grid, "seeds=[2,3]"), tmp_path)
    assert cell.figures["sync_correlation"]["clips"] == pytest.approx([0.9] * 3 + [0.91] * 3)


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.sources = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]


@pytest.fixture
def report(scorer, tmp_path):
    made = config("grid={sampler.sample_steps: [2, 3, 4]}")
    cells = sweep(made, tmp_path)
    for cell in cells:
        if cell.figures:
            (cell.folder / "videos_1").mkdir()
            with VideoWriter(cell.folder / "videos_1/clip_000.mp4", 64, 64, num_frames=100) as writer:
                writer.write(np.full((100, 64, 64, 3), 90, np.uint8))
    return write_report(cells, tmp_path, title="steps")


def test_the_report_page_needs_no_other_files(report):
    page = Page(report.read_text())
    assert page.tags.count("svg") == 3
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
    assert float(rows[0]["sync_correlation_mean"]) == pytest.approx(0.85 + 0.015)
    assert "teacher_distance_mean" not in rows[0]  # no cell is a teacher


def test_the_distance_of_a_student_is_from_the_teacher_with_most_steps(scorer, tmp_path):
    cells = sweep(config("grid={weights: [student, teacher], sampler.sample_steps: [1, 2, 4]}"), tmp_path)
    page = write_report(cells, tmp_path, title="steps")
    rows = {(row["weights"], row["sampler.sample_steps"]): row for row in csv.DictReader((tmp_path / "report.csv").open())}
    given = {key: float(row["teacher_distance_mean"]) for key, row in rows.items()}
    reference = np.array([0.0, 0.25, 0.0, -1.0])
    assert given["teacher", "4"] == given["student", "4"] == 0.0
    assert given["student", "1"] == pytest.approx(0.75 / 2 / reference.std(), abs=1e-6) and given["student", "2"] < given["student", "1"]
    assert Page(page.read_text()).tags.count("svg") == 4


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


def test_the_cells_are_one_group_in_wandb(scorer, tmp_path, monkeypatch):
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


@pytest.mark.parametrize(("engine", "package"), [("submitit", "submitit"), ("ray", "ray")])
def test_a_missing_engine_names_the_package_to_install(engine, package, tmp_path):
    try:
        __import__(engine)
    except ImportError:
        with pytest.raises(ValueError, match=f"pip install {package}"):
            sweep(config(GRID, f"engine={engine}"), tmp_path)
    else:
        pytest.skip(f"{engine} is installed")


def test_a_killed_job_fails_its_cell_and_not_the_sweep(scorer, tmp_path, monkeypatch):
    submitit = pytest.importorskip("submitit")
    limits, real = [], sweeps.score

    class Here(submitit.AutoExecutor):
        def __init__(self, folder):
            super().__init__(folder, cluster="debug")

        def update_parameters(self, **parameters):
            limits.append(parameters["timeout_min"])
            super().update_parameters(**parameters)

    def killed(folder, processes):
        if "sample_steps-2" in folder.name:
            raise submitit.core.utils.UncompletedJobError("Job 7\nCANCELLED DUE TO TIME LIMIT")
        real(folder, processes)

    monkeypatch.setattr(submitit, "AutoExecutor", Here)
    monkeypatch.setattr(sweeps, "score", killed)
    bad, good = sweep(config(GRID, "engine=submitit"), tmp_path)
    assert limits == [240] and good.figures and not bad.figures
    assert bad.failure == "its job ended with UncompletedJobError\nJob 7\nCANCELLED DUE TO TIME LIMIT\n"


def test_a_lost_ray_worker_fails_its_cell_and_not_the_sweep(scorer, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    real = sweeps.score

    def killed(folder, processes):
        if "sample_steps-2" in folder.name:
            os._exit(1)
        real(folder, processes)

    monkeypatch.setattr(sweeps, "score", killed)
    try:
        bad, good = sweep(config(GRID, "engine=ray"), tmp_path)
    finally:
        ray.shutdown()
    assert good.figures and not bad.figures
    assert bad.failure.startswith("its job ended with WorkerCrashedError")


def test_grid_items_of_the_command_line_are_gathered():
    made = compose(
        ENTRY, ablate_command.gathered(["grid.sampler.sample_steps=[2,3]", "grid.video.size=[64x64,128x128]", "clips=2", "num_videos=1"])
    )
    assert made.grid == {"sampler.sample_steps": [2, 3], "video.size": ["64x64", "128x128"]}
    assert json.dumps(made.grid)
