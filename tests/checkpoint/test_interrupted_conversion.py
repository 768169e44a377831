"""A killed conversion leaves nothing that looks complete, and the next one continues where it stopped."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from convert_command import convert, infer

from sonic.checkpoint import convert as conversion
from sonic.checkpoint import tensor_files

SHARD = 40_000  # bytes, so that the miniature has several shards


def killed_in_shard(number: int, *argv: str, shard: int = SHARD) -> None:
    """Convert in a new process that is killed in the middle of a shard."""
    written = 0

    def deadly(path: Path, parts: dict, tensors: Iterator) -> None:
        nonlocal written
        written += 1
        tensor_files.write(path, parts, dying(tensors) if written == number else tensors)

    def dying(tensors: Iterator) -> Iterator:
        yield next(tensors)
        os.kill(os.getpid(), signal.SIGKILL)

    conversion.SHARD_BYTES, conversion.write = shard, deadly
    convert(*argv)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def times_of(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in folder.glob("*.safetensors")}


@pytest.fixture(scope="module")
def killed(downloads, tmp_path_factory) -> tuple[list[str], Path]:
    """A conversion killed in its third shard: its arguments, and the folder it left."""
    folder = tmp_path_factory.mktemp("killed")
    argv = [f"source={downloads / 'Wan2.2-S2V-14B'}", f"live_avatar={downloads / 'LiveAvatar'}"]
    process = multiprocessing.get_context("forkserver").Process(target=killed_in_shard, args=(3, *argv, f"output={folder / 'out'}"))
    process.start()
    process.join(timeout=240)
    assert process.exitcode == -signal.SIGKILL
    assert [path.name for path in folder.iterdir()] == ["out.partial"]
    return argv, folder / "out.partial"


@pytest.fixture
def cut_off(killed, tmp_path, monkeypatch) -> tuple[list[str], Path]:
    """A copy of the killed conversion for one test."""
    monkeypatch.setattr(conversion, "SHARD_BYTES", SHARD)
    argv, left = killed
    return [*argv, f"output={tmp_path / 'out'}"], shutil.copytree(left, tmp_path / "out.partial")


def test_what_a_killed_conversion_leaves_does_not_look_complete(cut_off, tmp_path, capfd):
    _, left = cut_off
    assert len(times_of(left / "dit")) == 2 and len(list(left.rglob("*.part"))) == 1
    assert infer(tmp_path, "model=live_avatar_14b", f"checkpoint={left}", f"output={tmp_path / 'a.mp4'}") == 2
    assert "no converted checkpoint" in capfd.readouterr().err


def test_the_next_conversion_reuses_the_complete_shards(cut_off, tmp_path):
    argv, left = cut_off
    before = times_of(left / "dit")
    assert convert(*argv) == 0
    after = times_of(tmp_path / "out/dit")
    assert {name: after[name] for name in before} == before and len(after) > 3
    assert convert(*argv[:2], f"output={tmp_path / 'whole'}") == 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert not left.exists()


@pytest.mark.parametrize("change", ["another strength", "a file fetched again", "no plan"])
def test_another_conversion_starts_over(cut_off, downloads, tmp_path, change):
    argv, left = cut_off
    before = times_of(left / "dit")
    if change == "another strength":
        argv = [*argv, "lora.alpha=32"]
    elif change == "no plan":
        (left / conversion.PLAN).unlink()
    else:
        source = shutil.copytree(downloads / "Wan2.2-S2V-14B", tmp_path / "source", copy_function=shutil.copyfile)
        argv = [f"source={source}", *argv[1:]]
    (left / "dit" / "old.safetensors").write_bytes(b"half")
    assert convert(*argv) == 0
    after = times_of(tmp_path / "out/dit")
    assert "old.safetensors" not in after
    assert all(after[name] != time for name, time in before.items())
