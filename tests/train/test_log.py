"""Where figures and films of a run go: always the run folder, W&B when asked, and on without it when it is not there."""

from __future__ import annotations

import errno
import json
import struct
import sys
import time

import numpy as np
import pytest

from sonic.data.video import VideoWriter
from sonic.train.guard import WARM, Guard
from sonic.train.log import RunLog, read_scalars
from sonic.train.settings import LogConfig


def filmed(folder, step):
    path = folder / "samples" / f"step_{step:08d}.mp4"
    path.parent.mkdir(parents=True, exist_ok=True)
    with VideoWriter(path, 32, 32, num_frames=3) as writer:
        writer.write(np.full((3, 32, 32, 3), 40 * step, np.uint8))
    return path


def logged(folder, wandb, steps=(1, 2)):
    with RunLog(folder, LogConfig(wandb=wandb, bar=False), name="told").open(steps[0] - 1, None) as log:
        for step in steps:
            video = filmed(folder, step) if step == steps[-1] else None
            log.scalars(step, {"train/student_loss": 1 / step, "eval/sync_correlation": 0.5 * step}, video)


def records(file):
    """The records of a .wandb file: LevelDB's log format behind a header of 7 bytes, in blocks of 32 KiB."""
    content, place, whole = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
        size, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        whole += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # the whole of a record, or its end
            yield whole
            whole = b""


def read_back(folder, *, last):
    """Figures by step, and ids, of the offline W&B runs of a folder, when step `last` is among them: W&B writes on after a run."""
    until = time.monotonic() + 30
    while last not in (found := read_now(folder))[0] and time.monotonic() < until:
        time.sleep(0.2)
    return found


def read_now(folder):
    steps, ids = {}, set()
    for record in parsed(folder):
        if record.WhichOneof("record_type") == "run":
            ids.add(record.run.run_id)
        if record.WhichOneof("record_type") == "history":
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            steps.setdefault(row["_step"], {}).update(row)
    return steps, ids


def parsed(folder):
    """What the offline W&B runs of a folder have written."""
    from wandb.proto import wandb_internal_pb2 as proto

    for file in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        for data in records(file):
            record = proto.Record()
            record.ParseFromString(data)
            yield record


def test_what_wandb_keeps_offline_can_be_read_back(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged(tmp_path, "offline")
    logged(tmp_path, "offline", steps=(3, 4))
    steps, ids = read_back(tmp_path, last=4)
    assert [steps[step]["train/student_loss"] for step in (1, 2, 3, 4)] == [1, 1 / 2, 1 / 3, 1 / 4]
    assert steps[4]["eval/sync_correlation"] == 2.0
    assert steps[2]["eval/sample/_type"] == steps[4]["eval/sample/_type"] == "video-file"
    assert ids == {(tmp_path / "wandb_id.txt").read_text()}


def test_without_wandb_everything_is_in_the_run_folder(tmp_path):
    logged(tmp_path, "off")
    assert not (tmp_path / "wandb").exists()
    first, last = read_scalars(tmp_path)
    assert "video" not in first and (tmp_path / last["video"]).is_file() and last["eval/sync_correlation"] == 1.0


class Full:
    """A file on a disk with room for so many bytes more."""

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
def test_a_full_disk_costs_lines_and_not_the_run(room, tmp_path, caplog):
    with RunLog(tmp_path, LogConfig(bar=False), name="told").open(0, None) as log:
        log.scalars(1, {"loss": 1.0})
        log._file = Full(log._file, room)
        log.scalars(2, {"loss": 2.0})
        log._file = log._file.file
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
    monkeypatch.setattr("sonic.train.log.PATIENCE_S", 3)
    logged(tmp_path, "online")
    assert "logging offline" in caplog.text
    assert read_back(tmp_path, last=2)[0][2]["train/student_loss"] == 0.5
    assert len(read_scalars(tmp_path)) == 2


def test_a_loss_that_explodes_is_a_fault_and_one_that_jumps_is_not():
    guard = Guard()
    for turn in range(2 * WARM):
        assert not guard.fault("student", 1.0 + 0.5 * (turn % 3), 1.0)
        assert not guard.fault("critic", 1e3, 1.0)
    assert not guard.fault("student", 20.0, 1.0)
    assert "exploded from" in guard.fault("student", 1e3, 1.0)
    assert "not finite" in guard.fault("student", 1.0, float("inf"))


def test_a_beginning_that_falls_or_rises_is_no_explosion():
    guard = Guard()
    assert not any(guard.fault("student", 1e4 * 0.5**turn, 1.0) for turn in range(12))
    guard = Guard()
    assert not any(guard.fault("student", 1e-6 * 3.0**turn, 1.0) for turn in range(WARM + 20))
