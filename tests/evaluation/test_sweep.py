"""Sweeps: every cell is run once per seed in a process of its own, and failures are reported and retried on request."""

from __future__ import annotations

import _thread
import json
import os
import threading
import time

import fake_score
import pytest
from sweeping import ENTRY, GRID, ablate, config, sweep, written
from wandb_recorder import record_wandb

from sonic.cli import compose
from sonic.commands import ablate_command
from sonic.evaluation import sweep as sweeps
from sonic.evaluation.sweep import cells_of, run_jobs
from sonic.training.train_config import LogConfig
from sonic.training.wandb_log import log_cells


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
