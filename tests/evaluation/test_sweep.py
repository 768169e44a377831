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
from functools import partial
from html.parser import HTMLParser

import fake_score
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from wandb_recorder import record_wandb

from sonic.cli import Entry, compose, run_command
from sonic.commands import ablate_command
from sonic.data.clips import write_index
from sonic.data.video import VideoWriter
from sonic.evaluation import sweep as sweeps
from sonic.evaluation.sweep import cells_of, run_jobs
from sonic.evaluation.sweep_config import AblateConfig
from sonic.training import loop
from sonic.training.train_config import LogConfig
from sonic.training.wandb_log import log_cells

ENTRY = Entry("ablate", AblateConfig, collections=("ablate",))
GRID = "grid={sampler.sample_steps: [2, 4], weights: [teacher]}"


class Ended:
    """A job that was done in this process."""

    def __init__(self, execute, run):
        try:
            self.error = execute(run)
        except ValueError as error:
            self.error = error

    def done(self):
        return True

    def exception(self):
        return self.error


def sweep(made, folder, score=fake_score.score, *, processes=False):
    """The cells of a sweep that evaluates with a stand-in, in this process or in those of submitit."""
    cells = cells_of(made, folder)
    with pytest.MonkeyPatch.context() as patch:
        if processes:
            pytest.importorskip("submitit")
        else:
            patch.setitem(sweeps.ENGINES, "local", lambda execute, config, folder: partial(Ended, execute))
            patch.setattr(sweeps, "POLL_S", 0)
        sweeps.sweep(made, cells, folder, score)
    return cells


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
    first, second = (cell.run_of(seed).options for seed in cell.seeds)
    assert {"sampler.sample_steps=4", "weights=teacher", "eval.clips=3", "eval.seed=1", "+preset=fast_preview"} <= set(first)
    assert "eval.seed=2" in second
    assert cell.name == "sample_steps=4, weights=teacher"


def test_a_cell_gets_only_the_machine_options_that_were_set(tmp_path):
    given = cells_of(config(GRID, "run.threads=1", "run.dtype=bfloat16"), tmp_path)[0].options
    assert "run.threads=1" in given and "run.dtype=bfloat16" in given and not any(item.startswith("run.device") for item in given)
    assert not any(item.startswith("run.") for item in cells_of(config(GRID), tmp_path)[0].options)


def test_the_options_of_a_cell_are_those_of_the_command_evaluate(tmp_path):
    cell = cells_of(config(GRID, "run.threads=1"), tmp_path)[0]
    made = compose(ablate_command.JOBS["evaluate"].entry([]), cell.run_of(2).options)
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
    good, bad, killed = cells = sweep(config(grid, "seeds=[1]"), tmp_path, processes=True)
    assert good.figures and not bad.figures and not killed.figures
    assert "three steps are not to be had" in bad.failure and "has not produced any output" in killed.failure
    before = written(cells)
    assert written(sweep(config(grid, "seeds=[1]"), tmp_path)) == before
    after = written(sweep(config(grid, "seeds=[1]", "retry=true"), tmp_path, processes=True))
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
        sweep(made, tmp_path, fake_score.score_until_stopped, processes=True)
    assert cell.figures is None and not cell.failure
    assert (cell.folder / "saved").read_text() == "True"  # it had time, and the signal came from the sweep alone
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

    def submit(run):
        assert sum(job.looks < 2 for job in started) < 2
        started.append(Ends(ValueError("no") if "sampler.sample_steps=2" in run.options else None))
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


def test_every_seed_of_a_cell_is_a_run_of_one_group_in_wandb_with_its_whole_config(tmp_path, monkeypatch):
    runs, cells = record_wandb(monkeypatch), sweep(config(GRID), tmp_path)
    cells = ablate_command.checked(cells, None)
    log_cells(cells, LogConfig(wandb="offline"), group="mine")
    assert [run.keywords["name"] for run in runs] == [f"{cell.name}, seed {seed}" for cell in cells for seed in (1, 2)]
    for run, (cell, seed) in zip(runs, [(cell, seed) for cell in cells for seed in (1, 2)], strict=True):
        assert run.keywords["group"] == "mine" and run.keywords["job_type"] == "evaluate" and run.exit_code == 0
        assert cell.choices.items() <= run.choices.items() and run.choices["seed"] == seed
        assert run.choices["sampler"]["sample_steps"] == cell.choices["sampler.sample_steps"]
        assert run.summary["eval/sync_correlation"] == cell.seed_figures[seed]["sync_correlation"]["mean"]
    log_cells(cells, LogConfig(wandb="offline"), group="mine")  # a repeated command continues the runs
    assert [run.keywords["id"] for run in runs[4:]] == [run.keywords["id"] for run in runs[:4]]


def test_the_jobs_of_a_sweep_log_into_its_group(tmp_path):
    given = ["log.wandb=offline", "log.project=mine"]
    options = cells_of(config(GRID, *given), tmp_path / "sweep")[0].run_of(1).options
    assert {"log.wandb=offline", "log.project=mine", "log.group=sweep"} <= set(options)
    training = cells_of(config("grid={optim.lr: [1]}", "job=train", "log.every_steps=5", *given, "log.group=own"), tmp_path)[0]
    assert {"log.every_steps=5", "log.group=own"} <= set(training.run_of(1).options)
    assert not any("log." in option for option in training.options)  # where results are logged does not make them others


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1,2", [1, 2]), ("[1,2]", [1, 2]), ("range(1,4)", [1, 2, 3]), ("choice(a,b)", ["a", "b"]), ("1e-4,3e-4", [1e-4, 3e-4]),
        ("4x24gb,8x80gb", ["4x24gb", "8x80gb"]), ("true,null", [True, None]), ("[a,b],[c]", [["a", "b"], ["c"]]),
        ("'a, b',c", ["a, b", "c"]), ("[['a, b',c]]", [["a, b", "c"]]), ("3", [3]),
    ],
)  # fmt: skip
def test_values_of_the_grid_are_written_as_hydra_writes_them(text, values):
    assert compose(ablate_command.ENTRY, [f"grid.x.y={text}", "job=plan"]).grid == {"x.y": values}


def test_values_reach_a_cell_as_they_were_written(tmp_path):
    made = config("job=train", "grid={a: [[m, n], null], b: [x y], +distill: [p], c: [true]}")
    first, second = (cell.options for cell in cells_of(made, tmp_path))
    assert first == ["a=[m,n]", "b=x y", "+distill=p", "c=true"] and second[0] == "a=null"


def ablate(*argv):
    return run_command(ablate_command.ENTRY, ablate_command.ablate, ["name=mine", *argv])


def test_all_faults_of_all_cells_are_said_at_once_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    pytest.importorskip("submitit")
    monkeypatch.chdir(tmp_path)
    assert ablate("grid.sampler.sample_steps=2,two,0", "grid.weights=teacher,student", "grid.decode.online=true,maybe") == 2
    said = capsys.readouterr().err
    for sentence in (
        "sampler.sample_steps=two is not a whole number",
        "sampler.sample_steps=0 is impossible",
        "decode.online=maybe is not true",
    ):
        assert said.count(sentence) == 1
    assert "sample_steps=two, weights=teacher" in said and "10 of 12 cells cannot run" in said and "nothing was started" in said
    assert ablate("grid.optim.lr=1,2") == 2  # an option of another command
    assert "optim.lr is not an option" in capsys.readouterr().err
    assert ablate("job=train", "common=[objective=viseme,budget.max_steps=2,data.folder=missing]", "grid.optim.lr=1e-3,1e-4") == 2
    assert "missing" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["grid.eval.seed=1,2"], "eval.seed: a sweep sets this itself"),
        (["common=[eval.clips=3]", "grid.sampler.sample_steps=1,2"], "eval.clips: a sweep sets this itself"),
        (["job=train", "common=[objective=viseme,budget.max_steps=2]", "grid.seed=1,2"], "seed: a sweep sets this itself"),
        (["job=train", "common=[objective=viseme,budget.max_steps=2]", "data.source=drawn", "grid.optim.lr=1"], "data.source"),
        (["job=train", "common=[objective=viseme,budget.max_steps=2,data.source=drawn]", "grid.optim.lr=1", "score=true"], "score=true"),
        (["job=evaluate", "grid.model=wan_s2v_14b,preview"], "generates whole pictures"),
    ],
)
def test_what_a_cell_cannot_do_is_refused_before_it_starts(argv, sentence, tmp_path, monkeypatch, capsys):
    pytest.importorskip("submitit")
    monkeypatch.chdir(tmp_path)
    assert ablate(*argv) == 2
    assert sentence in capsys.readouterr().err and not [*tmp_path.iterdir()]


def test_cells_that_are_the_same_are_run_once(tmp_path, caplog):
    cells = cells_of(config("grid={sampler.sample_steps: [2, 4], sampler.sample_guide_scale: [0, 1]}"), tmp_path)  # 0 and 1 are both "off"
    kept = ablate_command.checked(cells, None)
    assert [cell.name for cell in kept] == ["sample_steps=2, sample_guide_scale=0", "sample_steps=4, sample_guide_scale=0"]


@pytest.fixture
def speech_clips(tmp_path):
    """A folder of clips on which a speech encoder learns."""
    rng, tensors, entries = torch.Generator().manual_seed(0), {}, []
    for number in range(3):
        tensors |= {f"c{number}/mel": torch.randn(48, 40, generator=rng), f"c{number}/visemes": torch.rand(24, 5, generator=rng)}
        entries.append({"name": f"c{number}", "shard": "a.safetensors", "latent_frames": 6, "tensors": ["mel", "visemes"]})
    (tmp_path / "clips").mkdir()
    save_file(tensors, tmp_path / "clips/a.safetensors")
    write_index(tmp_path / "clips", entries, seed=7)
    return tmp_path / "clips"


def trainings(clips, folder, *argv):
    """Checked cells of a sweep of trainings of a speech encoder."""
    common = f"common=[objective=viseme,budget.max_steps=4,budget.batch_size=2,data.folder={clips},data.window=6,checkpoint.every_steps=2]"
    made = config("job=train", common, "grid={optim.lr: '1e-4,1e-3'}", "log.every_steps=1", *argv)
    return ablate_command.checked(cells_of(made, folder), made.score)


def test_a_cell_trains_and_exports_into_its_folder_and_continues_where_it_was_stopped(speech_clips, tmp_path, monkeypatch):
    cell = trainings(speech_clips, tmp_path)[0]
    assert not cell.scoring and cell.config["optim"]["lr"] == 1e-4
    assert cell.run_of(1).options[len(cell.options) :][0] == "seed=1" and cell.seed_figures == {}
    step, updates = loop._update, []

    def stopped(*args, **kwargs):
        if kwargs["step"] == 3 and not updates.count(3):
            updates.append(3)
            raise KeyboardInterrupt
        updates.append(kwargs["step"])
        return step(*args, **kwargs)

    monkeypatch.setattr(loop, "_update", stopped)
    with pytest.raises(RuntimeError, match="stopped"):
        ablate_command.execute(cell.run_of(1))
    assert not cell.result_file(1).is_file()
    ablate_command.execute(cell.run_of(1))
    assert updates == [0, 1, 2, 3, 2, 3]  # the last checkpoint was of step 2
    assert [line["step"] for line in cell.curve(1)] == [1, 2, 3, 4]
    assert (cell.run_folder(1) / "weights.safetensors").is_file() and (cell.run_folder(1) / "config.yaml").is_file()
    figures = cell.seed_figures[1]
    assert figures["step"]["clips"] == [4] and figures["student/loss"]["mean"] == cell.curve(1)[-1]["student/loss"]
    assert cell.figures is None  # of two seeds
    assert {path.name for path in tmp_path.iterdir()} == {"clips", "cells"}


@pytest.mark.parametrize("rank", [0, 8])
def test_what_was_trained_is_evaluated_with_its_own_sampler(rank, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("sonic.evaluation.evaluate.evaluate", asked.append)
    entry = ablate_command.JOBS["train"].entry([])
    argv = [
        "objective=consistency",
        "objective.sampler.sample_steps=3",
        "weights=teacher",
        "budget.max_steps=1",
        f"objective.learn.rank={rank}",
    ]
    made = compose(entry, [*argv, "export=out.safetensors", "model.trunk.num_layers=2"])
    ablate_command.evaluate_trained(made, ["eval.clips=1", "json=out.json"])
    (given,) = asked
    assert (given.json, given.eval.clips, given.sampler.sample_steps, given.model.trunk.num_layers) == ("out.json", 1, 3, 2)
    assert (given.model.weights, given.model.lora.path) == (("teacher", "out.safetensors") if rank else ("out.safetensors", ""))


def test_another_evaluation_of_a_training_does_not_train_again(tmp_path):
    argv = ["job=train", "grid={optim.lr: [1]}"]
    (few,), (many,) = (cells_of(config(*argv, given), tmp_path) for given in ("clips=3", "clips=9"))
    assert few.folder == many.folder and few.run_of(1).folder == many.run_of(1).folder and few.result_file(1) != many.result_file(1)


def test_a_cell_of_plans_has_the_best_plan(tmp_path, monkeypatch):
    made = config("job=plan", "seeds=[1]", "grid={model: [live_avatar_14b], hardware: '8x80gb,1x24gb', video.size: [704x384]}")
    fits, tight = cells = ablate_command.checked(cells_of(made, tmp_path), None)
    for cell in cells:
        ablate_command.execute(cell.run_of(1))
    assert fits.figures["fits"] == "yes" and fits.figures["plan"] and fits.figures["seconds_per_frame"] < tight.figures["seconds_per_frame"]
    assert 0 < fits.figures["peak_gib"] < 80 and "fits" in fits.figures["why"]
    page = write_report(cells, tmp_path).read_text()
    assert fits.figures["why"] in page and "seconds per frame" in page


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


@pytest.mark.parametrize(
    ("typed", "given"),
    [
        ("grid={}", "grid is empty"),
        ("grid={seed: {a: 3}}", "no values to try"),
        ("grid={seed: []}", "no values to try"),
        ("grid={seed: '1,,2'}", "grid.seed: extraneous input"),
        ("grid={seed: 'interval(0,1)'}", "INTERVAL"),
        ("job=judge", "choose one of"),
        ("job=plan  seeds=[1,2]", "has nothing random"),
        ("score=true", "is for job=train"),
        ("jobs=0", "at least 1"),
        ("minutes=0", "at least 1"),
        ("engine=slrm", "choose one of"),
        ("exclude=[{steps: 4}]", "does not name options"),
    ],
)
def test_an_impossible_sweep_is_refused(typed, given):
    with pytest.raises(ValueError, match=given):
        compose(ENTRY, [GRID, *typed.split("  ")])


@pytest.mark.parametrize(("engine", "packages"), [("local", "submitit matplotlib"), ("ray", "submitit matplotlib ray")])
def test_missing_packages_are_named_before_anything_is_scored(engine, packages, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweeps, "find_spec", lambda name: None)
    assert ablate(GRID, f"engine={engine}") == 2
    assert f"run: pip install {packages}\n" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_a_lost_ray_worker_fails_its_cell_and_not_the_sweep(tmp_path):
    ray = pytest.importorskip("ray")
    try:
        good, bad = sweep(config("grid={sampler.sample_steps: [2, 13]}", "engine=ray", "seeds=[1]"), tmp_path, processes=True)
    finally:
        ray.shutdown()
    assert good.figures and not bad.figures
    assert "died" in bad.failure


def test_grid_items_of_the_command_line_are_gathered():
    argv = ["grid.sampler.sample_steps=[2,3]", "grid.video.size=[64x64,128x128]", "clips=2", "num_videos=1"]
    made = compose(ablate_command.ENTRY, argv)
    assert made.grid == {"sampler.sample_steps": [2, 3], "video.size": ["64x64", "128x128"]}
    assert json.dumps(made.grid)
