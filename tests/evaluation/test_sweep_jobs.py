"""What a sweep does in its cells: values and options, checks before the start, trainings and plans."""

from __future__ import annotations

import time

import pytest
import torch
from safetensors.torch import save_file
from sweeping import ablate, config, write_report

from sonic.cli import compose
from sonic.commands import ablate_command
from sonic.data.clips import write_index
from sonic.evaluation.sweep import cells_of
from sonic.training import loop


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


def test_all_faults_of_all_cells_are_listed_at_once_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    pytest.importorskip("submitit")
    monkeypatch.chdir(tmp_path)
    assert ablate("grid.sampler.sample_steps=2,two,0", "grid.weights=teacher,student", "grid.decode.online=true,maybe") == 2
    errors = capsys.readouterr().err
    for sentence in (
        "sampler.sample_steps=two is not a whole number",
        "sampler.sample_steps=0 is impossible",
        "decode.online=maybe is not true",
    ):
        assert errors.count(sentence) == 1
    assert "sample_steps=two, weights=teacher" in errors and "10 of 12 cells cannot run" in errors and "nothing was started" in errors
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
            while not (cell.run_folder(1) / "checkpoints/step_00000002").exists():  # it is written in the background
                time.sleep(0.01)
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
