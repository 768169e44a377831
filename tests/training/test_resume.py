"""A training that continues says from where and what has changed, refuses what must not change, and keeps every start's files."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from safetensors.torch import save_file

from sonic.cli import compose, run_command
from sonic.commands.train_command import ENTRY, train
from sonic.data.clips import write_index
from sonic.training import build, resume
from sonic.training.checkpoint import newest_first

RUN = Path("runs/r")


@pytest.fixture
def options(tmp_path, monkeypatch):
    """The options of a small training in this folder, of 4 steps."""
    monkeypatch.chdir(tmp_path)
    rng = torch.Generator().manual_seed(0)
    (tmp_path / "clips").mkdir()
    save_file({"c/mel": torch.randn(48, 40, generator=rng), "c/visemes": torch.rand(24, 5, generator=rng)}, "clips/a.safetensors")
    entry = {"name": "c", "shard": "a.safetensors", "latent_frames": 6, "tensors": ["mel", "visemes"]}
    write_index(tmp_path / "clips", [entry], seed=7)
    budget = ["budget.max_steps=4", "budget.batch_size=1", "budget.accumulate=2", "log.every_steps=1", "log.bar=false"]
    return ["objective=viseme", "name=r", "data.folder=clips", "data.window=6", "speed.device=cpu", *budget]


def trained(*argv: str) -> int:
    return run_command(ENTRY, train, argv)


def test_a_start_says_from_where_it_goes_on_and_what_has_changed(options, monkeypatch, capsys):
    assert trained(*options) == 0
    assert "resuming" not in capsys.readouterr().out
    assert trained(*options, "budget.max_steps=5") == 0
    shown = capsys.readouterr()
    assert "resuming runs/r at step 4, after 0.0 minutes, of 5 steps" in shown.out
    assert shown.err == "sonic: warning: changed since that checkpoint: budget.max_steps 4 -> 5\n"
    assert trained(*options, "budget.max_steps=5") == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sonic.system.run_folder.Run.commit", "abc123")
    assert trained(*options, "budget.max_steps=6", "optim.lr=0.002", "seed=3") == 0
    shown = capsys.readouterr()
    for change in ("budget.max_steps 5 -> 6", "optim.lr 0.001 -> 0.002", "seed 0 -> 3", "code ", "-> abc123"):
        assert change in shown.err
    log = (RUN / "log.txt").read_text()
    assert "resuming runs/r at step 5" in log and "optim.lr 0.001 -> 0.002" in log


def test_what_must_not_change_is_refused_with_both_values_and_changes_nothing(options, capsys):
    assert trained(*options) == 0
    files = {path: path.read_bytes() for path in RUN.rglob("*") if path.is_file()}
    for before, after in (
        ("data.window=6", "data.window=5"),
        ("model.trunk.num_layers=6", "model.trunk.num_layers=7"),
        ("model.audio.audio_dim=160", "model.audio.audio_dim=80"),
        ("objective.head_only=false", "objective.head_only=true"),
        ("objective.name=viseme", "objective=portrait"),
    ):
        assert trained(*options, after) == 2
        message = capsys.readouterr().err
        assert f"{after.replace('objective=', 'objective.name=')} cannot continue the training of step 4, which has {before}" in message
        assert "use that again, or a new name=" in message
    assert {path: path.read_bytes() for path in RUN.rglob("*") if path.is_file()} == files
    assert trained(*options, "checkpoint.resume=never", "data.window=5") == 0  # it begins again


def test_every_start_keeps_its_config_and_command(options):
    for steps in (2, 3, 4):
        assert trained(*options, f"budget.max_steps={steps}") == 0
    starts = [RUN / name for name in ("starts/0001", "starts/0002", ".")]
    for steps, start in zip((2, 3, 4), starts, strict=True):
        assert f"budget.max_steps={steps}" in (start / "command.txt").read_text()
        assert f"max_steps: {steps}" in (start / "config.yaml").read_text() and (start / "git_commit.txt").is_file()
    assert len(list((RUN / "starts").iterdir())) == 2


def test_a_named_checkpoint_of_another_run_is_named_and_compared(options, capsys):
    assert trained(*options) == 0
    source = newest_first(RUN / "checkpoints")[0]
    assert trained(*options, "name=other", f"checkpoint.resume={source}", "budget.max_steps=5") == 0
    shown = capsys.readouterr()
    assert f"resuming runs/other from {source} at step 4" in shown.out
    assert "name r -> other" in shown.err and "checkpoint.resume" not in shown.err
    assert trained(*options, "name=third", f"checkpoint.resume={source}", "data.window=5") == 2
    assert "which has data.window=6" in capsys.readouterr().err


def test_a_checkpoint_of_an_older_version_says_that_it_has_no_options(options, capsys):
    assert trained(*options) == 0
    file = newest_first(RUN / "checkpoints")[0] / "facts.json"
    file.write_text(json.dumps({name: value for name, value in json.loads(file.read_text()).items() if name not in ("options", "commit")}))
    assert trained(*options, "budget.max_steps=5") == 0
    assert "without its options" in capsys.readouterr().err


def continued(folder: str, argv: list[str]) -> str:
    """A rank of a training that continues; what it logs, or its refusal."""
    os.chdir(folder)
    found, handler = [], logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    for log in (resume.LOG, build.LOG):
        log.setLevel(logging.INFO)
        log.addHandler(handler)
    config = compose(ENTRY, argv)
    try:
        build.run_training(config, RUN)
    except ValueError as error:
        return str(error)
    return "\n".join(found)


def test_several_ranks_refuse_together_and_say_that_their_number_changed(options, tmp_path, monkeypatch):
    assert trained(*options) == 0
    monkeypatch.chdir(Path(__file__).parents[2])  # from where the server of the ranks imports
    refused = on_ranks(2, continued, str(tmp_path), [*options, "data.window=5"])
    assert refused[0] == refused[1] and "data.window=5 cannot continue the training of step 4" in refused[0]
    assert "processes 1 -> 2 (sums in another order" in on_ranks(2, continued, str(tmp_path), [*options, "budget.max_steps=5"])[0]
