"""Atomic writing of files: complete or absent, with the mode of the umask, and with unique temporary names."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors.torch
import torch
from run_files import save_weights as save_model
from safetensors.torch import load_file
from torch import nn

from sonic.checkpoint.converted import _store
from sonic.data.shards import write_shard
from sonic.system.files import save_tensors, write_json, written_temporary

TENSORS = {"weight": torch.arange(6.0).reshape(2, 3)}
WRITERS = {
    "shard": lambda path: write_shard(path, TENSORS, clips=[]),
    "model": lambda path: save_model(nn.Linear(3, 2), path),
    "prompt": lambda path: _store(path, TENSORS),
    "any": lambda path: save_tensors(TENSORS, path),
}


@pytest.fixture
def for_oneself(monkeypatch):
    """Imitate safetensors from 0.8.1 on, whose files are readable by their owner only."""
    write = safetensors.torch.serialize_file

    def serialize_file(tensors, path, *rest, **named):
        write(tensors, path, *rest, **named)
        os.chmod(path, 0o600)

    monkeypatch.setattr(safetensors.torch, "serialize_file", serialize_file)


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
@pytest.mark.parametrize("writer", WRITERS)
def test_tensor_files_get_the_mode_of_the_umask(writer, umask, tmp_path, for_oneself):
    before = os.umask(umask)
    try:
        WRITERS[writer](tmp_path / "a.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o666 & ~umask
    assert set(load_file(tmp_path / "a.safetensors")) >= {"weight"}
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_temporary_names_are_short_and_unique(tmp_path):
    path = tmp_path / ("ä" * 125)
    with written_temporary(path) as partial, written_temporary(path) as other:
        assert partial != other
        partial.write_text("text")
    assert path.read_text() == "text"


def test_many_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: save_tensors({"n": torch.full((1000,), n)}, tmp_path / "a.safetensors"), range(32)))
    found = load_file(tmp_path / "a.safetensors")["n"]
    assert (found == found[0]).all() and [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), ValueError("bad"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_file_as_it_was(fault, tmp_path):
    (tmp_path / "a").write_text("before")
    with pytest.raises(type(fault)) as found, written_temporary(tmp_path / "a") as partial:
        partial.write_text("half")
        raise fault
    assert (tmp_path / "a").read_text() == "before" and [path.name for path in tmp_path.iterdir()] == ["a"]
    assert not isinstance(fault, OSError) or found.value.filename == str(tmp_path / "a")


def test_tensors_that_cannot_be_written_name_their_file(tmp_path):
    with pytest.raises(OSError, match="missing/a.safetensors"):
        save_tensors(TENSORS, tmp_path / "missing/a.safetensors")


def test_json_goes_to_stdout_without_replacing_it(tmp_path):
    program = "from sonic.system.files import write_json; write_json([7], '/dev/stdout')"
    with (tmp_path / "out.txt").open("wb") as file:
        subprocess.run([sys.executable, "-c", program], stdout=file, check=True)
    assert json.loads((tmp_path / "out.txt").read_bytes()) == [7] and Path("/dev/stdout").is_symlink()


def test_json_goes_through_a_pipe_with_a_name(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE)
    write_json([7], tmp_path / "pipe")
    assert json.loads(reader.communicate()[0]) == [7]


def test_an_error_in_words_keeps_them(tmp_path):
    with pytest.raises(OSError, match="^the disk is full$"), written_temporary(tmp_path / "file"):
        raise OSError("the disk is full")
