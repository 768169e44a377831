"""The log of a run: always in the run folder, optionally W&B, and without it when W&B cannot be reached."""

from __future__ import annotations

import errno
import sys

import numpy as np
import pytest
from run_files import read_scalars
from wandb_recorder import record_wandb

from sonic.data.video import VideoWriter
from sonic.training.guard import WARM, Guard
from sonic.training.log import RunLog
from sonic.training.log_destination import JsonLines
from sonic.training.train_config import LogConfig


def video_of_step(folder, step):
    path = folder / "samples" / f"step_{step:08d}.mp4"
    path.parent.mkdir(parents=True, exist_ok=True)
    with VideoWriter(path, 32, 32, num_frames=3) as writer:
        writer.write(np.full((3, 32, 32, 3), 40 * step, np.uint8))
    return path


def logged(folder, wandb, steps=(1, 2)):
    with RunLog(folder, LogConfig(wandb=wandb, bar=False), name="details").open(steps[0] - 1) as log:
        for step in steps:
            video = video_of_step(folder, step) if step == steps[-1] else None
            log.scalars(step, {"student/loss": 1 / step, "eval/sync_correlation": 0.5 * step}, video)


def test_wandb_is_given_every_step_and_the_video_under_the_same_id_after_a_restart(tmp_path, monkeypatch):
    runs = record_wandb(monkeypatch)
    logged(tmp_path, "offline")
    logged(tmp_path, "online", steps=(3, 4))
    known = (tmp_path / "wandb_id.txt").read_text()
    assert [run.keywords["mode"] for run in runs] == ["offline", "online"]
    for run in runs:
        named = {"id": known, "resume": "allow", "dir": str(tmp_path), "name": "details", "project": LogConfig().project}
        assert named.items() <= run.keywords.items() and run.exit_code == 0
    figures = [{"student/loss": 1 / step, "eval/sync_correlation": 0.5 * step} for step in (1, 2, 3, 4)]
    for step in (2, 4):
        figures[step - 1]["eval/sample"] = ("video", str(tmp_path / f"samples/step_{step:08d}.mp4"), "mp4")
    assert [each for run in runs for each in run.logged] == [*enumerate(figures, 1)]


def test_wandb_learns_that_a_run_ended_with_an_error(tmp_path, monkeypatch):
    runs = record_wandb(monkeypatch)
    with pytest.raises(KeyError), RunLog(tmp_path, LogConfig(wandb="offline", bar=False), name="details").open(0):
        raise KeyError
    assert runs[0].exit_code == 1


def test_without_wandb_everything_is_in_the_run_folder(tmp_path):
    logged(tmp_path, "off")
    assert not (tmp_path / "wandb").exists()
    first, last = read_scalars(tmp_path)
    assert "video" not in first and (tmp_path / last["video"]).is_file() and last["eval/sync_correlation"] == 1.0


def test_the_progress_bar_shows_the_share_of_the_budget(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with RunLog(tmp_path, LogConfig(), name="details").open(2, 0.25) as log:
        log.tick(5, 0.5, {"student/loss": 1.0, "perf/samples_per_second": 2.5})
    shown = capsys.readouterr().err
    assert "details:  25%" in shown and "details:  50%" in shown and "step 5, loss 1.0000, 2.5 samples/s" in shown


class Full:
    """A file on a disk with `room` free bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, content):
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        some, self.room = content[: self.room], max(0, self.room - len(content))
        return self.file.write(some)

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("room", [0, 20])
def test_a_full_disk_loses_lines_but_does_not_end_the_run(room, tmp_path, caplog):
    with RunLog(tmp_path, LogConfig(bar=False), name="details").open(0) as log:
        log.scalars(1, {"loss": 1.0})
        lines = next(each for each in log._open if isinstance(each, JsonLines))
        lines.file = Full(lines.file, room)
        log.scalars(2, {"loss": 2.0})
        lines.file = lines.file.file
        log.scalars(3, {"loss": 3.0})
    assert [line["step"] for line in read_scalars(tmp_path)] == [1, 3]
    assert "scalars.jsonl could not be written" in caplog.text and "training goes on" in caplog.text


def test_a_wandb_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"log\.wandb=online needs W&B.*pip install wandb.*log\.wandb=off"):
        logged(tmp_path, "online")
    logged(tmp_path, "off")


def test_a_wandb_that_cannot_be_reached_does_not_stop_a_run(tmp_path, monkeypatch, caplog):
    pytest.importorskip("wandb")
    for name, value in {"WANDB_SILENT": "true", "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sonic.training.wandb_log.PATIENCE_S", 1)
    logged(tmp_path, "online")
    assert "logging offline" in caplog.text
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(read_scalars(tmp_path)) == 2


def test_an_exploding_loss_is_a_fault_and_a_jumping_one_is_not():
    guard = Guard()
    for turn in range(2 * WARM):
        assert not guard.fault("student", 1.0 + 0.5 * (turn % 3), 1.0)
        assert not guard.fault("critic", 1e3, 1.0)
    assert not guard.fault("student", 20.0, 1.0)
    assert "exploded from" in guard.fault("student", 1e3, 1.0)
    assert "not finite" in guard.fault("student", 1.0, float("inf"))


def test_falling_or_rising_first_losses_are_no_explosion():
    guard = Guard()
    assert not any(guard.fault("student", 1e4 * 0.5**turn, 1.0) for turn in range(12))
    guard = Guard()
    assert not any(guard.fault("student", 1e-6 * 3.0**turn, 1.0) for turn in range(WARM + 20))
