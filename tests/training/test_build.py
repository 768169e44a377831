"""A training run from its config to its weights, card and log, as started by launch/train.py."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hanging import every_file_hangs
from ranks import on_ranks
from run_files import read_scalars
from safetensors.torch import load_file, save_file
from wandb_recorder import record_wandb

from sonic.data.clips import ClipDataset, write_index
from sonic.parallel import watchdog
from sonic.training import build
from sonic.training.build import run_training
from sonic.training.checkpoint import newest_first
from sonic.training.objective_config import VisemeConfig
from sonic.training.train_config import BudgetConfig, CheckpointConfig, DataConfig, LogConfig, SpeedConfig, TrainConfig


@pytest.fixture
def config(tmp_path):
    rng = torch.Generator().manual_seed(0)
    tensors, entries = {}, []
    for number in range(3):
        tensors[f"c{number}/mel"] = torch.randn(48, 40, generator=rng)
        tensors[f"c{number}/visemes"] = torch.rand(24, 5, generator=rng)
        entries.append({"name": f"c{number}", "shard": "a.safetensors", "latent_frames": 6, "tensors": ["mel", "visemes"]})
    folder = tmp_path / "clips"
    folder.mkdir()
    save_file(tensors, folder / "a.safetensors")
    write_index(folder, entries, seed=7)
    return TrainConfig(
        name="tiny", export=str(tmp_path / "out" / "speech.safetensors"), objective=VisemeConfig(),
        data=DataConfig(folder=str(folder), window=6), budget=BudgetConfig(max_steps=4, batch_size=2),
        log=LogConfig(every_steps=1, bar=False),
    )  # fmt: skip


def test_a_run_leaves_weights_a_card_and_a_log(config, tmp_path):
    run_training(config, tmp_path / "run", commit="abc123", command="python launch/train.py +train=tiny")
    weights = load_file(config.export)
    assert all(t.dtype == torch.float16 for t in weights.values())
    card = (tmp_path / "out" / "speech.md").read_text()
    for word in (
        "python launch/train.py +train=tiny",
        "abc123",
        "clips, seed 7 |",
        "training seed | 0",
        "steps | 4",
        "student/viseme_error",
    ):
        assert word in card
    assert [line["step"] for line in read_scalars(tmp_path / "run")] == [1, 2, 3, 4]


def test_a_card_includes_that_of_the_initial_weights(config, tmp_path, monkeypatch):
    run_training(config, tmp_path / "first", commit="abc123", command="the first")
    monkeypatch.setattr(build, "load_initial_weights", lambda *expected: None)
    config.init_from = config.export
    run_training(config, tmp_path / "second", commit="abc456", command="the second")
    card = (tmp_path / "out" / "speech.md").read_text()
    own, before = card.split("It began from:")
    assert "the second" in own and "abc456" in own and "the first" in before and "## tiny" in before


def test_a_finished_training_leaves_its_weights_and_card_alone(config, tmp_path, caplog):
    run_training(config, tmp_path / "run", commit="abc123", command="python launch/train.py +train=tiny")
    files = [tmp_path / "out" / name for name in ("speech.safetensors", "speech.md")]
    before = [(file.read_bytes(), file.stat().st_mtime_ns) for file in files]
    with caplog.at_level("INFO", logger="sonic.training"):
        run_training(config, tmp_path / "run", commit="other", command="again")
    assert [(file.read_bytes(), file.stat().st_mtime_ns) for file in files] == before
    assert "made no step" in caplog.text
    save_file({"other": torch.zeros(2)}, files[0])  # not what was trained
    run_training(config, tmp_path / "run", commit="other", command="again")
    assert files[0].read_bytes() == before[0][0] and "student/viseme_error" in files[1].read_text()


def test_a_longer_budget_continues_where_the_run_ended(config, tmp_path):
    run_training(config, tmp_path / "run")
    config.budget = BudgetConfig(max_steps=6, batch_size=2)
    assert run_training(config, tmp_path / "run").steps == 6
    assert newest_first(tmp_path / "run" / "checkpoints")[0].name == "step_00000006"
    assert [line["step"] for line in read_scalars(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_wandb_keeps_the_same_run_after_a_restart(config, tmp_path, monkeypatch):
    runs = record_wandb(monkeypatch)
    config.log = LogConfig(every_steps=1, bar=False, wandb="offline")
    run_training(config, tmp_path / "run")
    config.budget = BudgetConfig(max_steps=5, batch_size=2)
    run_training(config, tmp_path / "run")
    assert runs[0].keywords["id"] == runs[1].keywords["id"]
    assert [[step for step, _ in run.logged] for run in runs] == [[1, 2, 3, 4], [5]]


def test_a_name_that_is_not_in_a_table_lists_the_choices(config, tmp_path):
    config.data.source = "tape"
    with pytest.raises(ValueError, match="data.source=tape is unknown; choose one of: clips"):
        run_training(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"device": "gpu"}, "speed.device=gpu is unknown; choose one of: cpu, auto, cuda"),
        ({"threads": -1}, "speed.threads=-1: need 0"),
        ({"workers": -1}, "speed.workers=-1: need 0"),
    ],
)
def test_impossible_options_of_the_machine_are_refused(options, expected):
    with pytest.raises(ValueError, match=expected):
        SpeedConfig(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_missing_device_is_reported(config, tmp_path):
    config.speed = SpeedConfig(device="cuda")
    with pytest.raises(ValueError, match="speed.device=cuda: this machine has no CUDA device.*use speed.device=cpu"):
        run_training(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_missing_starting_weights_are_reported(config, tmp_path):
    config.init_from = str(tmp_path / "nothing.safetensors")
    with pytest.raises(ValueError, match="init_from"):
        run_training(config, tmp_path / "run")


def test_a_hang_anywhere_in_a_training_is_found(config, tmp_path):
    config.checkpoint = CheckpointConfig(every_steps=2)
    with every_file_hangs() as found:
        assert run_training(config, tmp_path / "run").steps == 4
    assert {Path(file).name for file in found} >= {"clips.py", "viseme.py", "loop.py", "engine.py", "log.py", "checkpoint.py"}


def hang_while_loading(config, folder):
    """The second of two training processes hangs; their output goes to files, since they are forked by a server."""
    with open(f"{folder}.said{dist.get_rank()}", "w") as output:
        os.dup2(output.fileno(), sys.stderr.fileno())
    watchdog.LOOK_S, watchdog.HOLD_S = 0.1, 1.0
    if dist.get_rank():
        ClipDataset.__getitem__ = lambda *draw: time.sleep(1000)
    run_training(config, folder)


def test_a_process_that_hangs_ends_the_training_of_all(config, tmp_path):
    config.budget = BudgetConfig(max_steps=4, batch_size=2, accumulate=2)
    config.speed = SpeedConfig(device="cpu", precision="float32", timeout_s=2.0)
    with pytest.raises(AssertionError):  # no rank returns
        on_ranks(2, hang_while_loading, config, tmp_path / "run", timeout_s=50)
    assert "rank 1: hangs at test_build.py" in "".join(path.read_text() for path in tmp_path.glob("run.said*"))
