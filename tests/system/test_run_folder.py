"""Run folders: unique, replaced only by a run that succeeds, and never changed by one that fails."""

from __future__ import annotations

import errno
import json
import logging
import os
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from infer_command import FACE, TINY, babble, write_wav, write_weights
from mounts import script, with_mounts

from sonic.cli import Entry, run_command
from sonic.commands import infer_command
from sonic.config import Ranks
from sonic.inference.infer_config import InferConfig
from sonic.system import run_folder
from sonic.system.run_folder import Run, start_logging

ENTRY = Entry("infer", InferConfig)
MAIN = Ranks()


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return write_weights(tmp_path_factory.mktemp("parts") / "weights")


@pytest.fixture
def command(tmp_path, monkeypatch, weights):
    monkeypatch.chdir(tmp_path)
    recording = write_wav(tmp_path / "speech.wav", babble(0.6))
    given = [f"weights={weights}", *FACE, *TINY]
    return lambda *argv: run_command(infer_command.ENTRY, infer_command.infer, [f"audio={recording}", *argv, *given])


def a_run(folder: Path, name: str = "", config: str = "seed: 1\n") -> Run:
    return Run((str(folder), name), config, command=["infer"], root=folder, ranks=MAIN)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_runs_of_one_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda form: "20261130-120000")
    runs = [a_run(tmp_path / "deep/runs", config=f"seed: {n}\n") for n in range(8)]
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda run: run.open(), runs))
    assert sorted(path.name for path in folders) == ["20261130-120000", *(f"20261130-120000-{n}" for n in range(2, 9))]
    for run in runs[:4]:
        run.keep()
    for run in runs:
        run.close()
    assert {path for path in tmp_path.rglob("*") if path.is_dir()} == {tmp_path / "deep", tmp_path / "deep/runs", *folders[:4]}
    assert [(path / "config.yaml").read_text() for path in folders[:4]] == [f"seed: {n}\n" for n in range(4)]


def test_only_the_first_rank_makes_a_folder(tmp_path):
    run = Run((str(tmp_path / "runs"), ""), "", command=[], root=tmp_path, ranks=Ranks(1, 2))
    run.open()
    assert not (tmp_path / "runs").exists()


def fails(config, run) -> None:
    run.open()
    run.write_json("other.json", {})
    raise ValueError("the input is bad")


def stops(config, run) -> None:
    run.open()
    raise KeyboardInterrupt


def breaks(config, run) -> None:
    run.open()
    raise RuntimeError("a fault")


def succeeds(config, run) -> None:
    run.open()
    run.keep()
    run.write_json("result.json", {"seed": config.seed})


@pytest.mark.parametrize("bad", [stops, breaks])
def test_a_run_that_fails_leaves_the_one_of_its_name_as_it_was(bad, tmp_path):
    position = [f"run.folder={tmp_path / 'runs'}", "name=r"]
    assert run_command(ENTRY, succeeds, [*position, "seed=1"]) == 0
    before = contents(tmp_path / "runs/r")
    assert run_command(ENTRY, bad, [*position, "seed=2"]) != 0
    assert contents(tmp_path / "runs/r") == before


def test_a_run_that_succeeds_replaces_the_one_of_its_name(tmp_path):
    position = [f"run.folder={tmp_path / 'runs'}", "name=r"]
    for seed in (1, 2):
        assert run_command(ENTRY, succeeds, [*position, f"seed={seed}"]) == 0
    found = contents(tmp_path / "runs/r")
    assert set(found) == {"config.yaml", "command.txt", "git_commit.txt", "log.txt", "result.json"}
    assert b"seed: 2" in found["config.yaml"] and json.loads(found["result.json"]) == {"seed": 2}


def test_a_folder_of_that_name_that_is_no_run_is_kept(tmp_path):
    (tmp_path / "runs/r").mkdir(parents=True)
    (tmp_path / "runs/r/mine.txt").write_text("mine")
    assert run_command(ENTRY, stops, [f"run.folder={tmp_path / 'runs'}", "name=r"]) == 130
    assert contents(tmp_path / "runs/r") == {"mine.txt": b"mine"}


@pytest.mark.parametrize("finished", [True, False])
def test_a_failed_run_leaves_the_files_of_a_concurrent_run_of_its_name(finished, tmp_path):
    first, second = a_run(tmp_path / "runs", "r"), a_run(tmp_path / "runs", "r")
    first.open()
    folder = second.open()
    if finished:
        second.keep()
    (folder / "out.mp4").touch()
    first.close()
    second.keep()
    second.close()
    assert set(contents(folder)) == {"config.yaml", "command.txt", "git_commit.txt", "log.txt", "out.mp4"}


def test_the_log_continues_in_the_final_folder(tmp_path):
    start_logging(main=True)
    for text in ("one", "two"):
        run = a_run(tmp_path / "runs", "r")
        run.open()
        logging.getLogger("sonic").info("%s before", text)
        run.keep()
        logging.getLogger("sonic").info("%s after", text)
        run.close()
    lines = (tmp_path / "runs/r/log.txt").read_text().splitlines()
    assert [line.split(": ")[1] for line in lines] == ["one before", "one after", "two before", "two after"]


def test_a_warning_of_ours_is_one_line_for_the_person_and_that_of_a_package_is_not_shown(tmp_path, capsys):
    run = a_run(tmp_path, "r")
    with warnings.catch_warnings():
        start_logging(main=True)
        run.open()
        warnings.warn_explicit("2 faces", UserWarning, run_folder.__file__, 1)
        warnings.warn_explicit("old habits", DeprecationWarning, run_folder.__file__, 1)
        warnings.warn_explicit("not ours", UserWarning, warnings.__file__, 1)
    run.close()
    assert capsys.readouterr() == ("", "sonic: warning: 2 faces\n")


def test_a_log_takes_any_name(tmp_path, capsys):
    run = a_run(tmp_path, "r")
    start_logging(main=True)
    run.open()
    run.keep()
    for level in (logging.INFO, logging.WARNING):
        logging.getLogger("sonic.data").log(level, "audio=%s was read", os.fsdecode(b"caf\xe9.wav"))
    run.close()
    out, err = capsys.readouterr()
    assert out == "audio=caf\\xe9.wav was read\n" and err == f"sonic: warning: {out}"
    assert (run.path / "log.txt").read_text().count("audio=caf\\xe9.wav was read") == 2


def test_a_log_that_cannot_be_written_says_so_once(tmp_path, capsys):
    start_logging(main=True)
    run = a_run(tmp_path / "runs", "r")
    (run.open() / "log.txt").symlink_to("/dev/full")
    run.keep()
    for _ in range(3):
        logging.getLogger("sonic").info("the work goes on")
    run.close()
    message = capsys.readouterr()
    assert message.out.count("the work goes on") == 3 and "Traceback" not in message.err
    assert message.err.count(f"{tmp_path / 'runs/r/log.txt'} ends here: No space left on device") == 1


@pytest.fixture
def full(monkeypatch):
    """Writing into run folders fails, writing videos does not."""

    def replace(source, target):
        if Path(target).suffix != ".mp4":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source), None, str(target))
        os.replace(source, target)

    monkeypatch.setattr("sonic.system.files.os", type("Full", (), {"replace": staticmethod(replace)}))


def test_a_video_is_kept_even_when_its_run_folder_is_full(command, full, tmp_path, capsys):
    assert command("output=video.mp4", "run.folder=elsewhere", "name=r") == 0
    message = capsys.readouterr().err
    assert "config and log of r cannot be written" in message
    for what in ("result.json", "the contact sheet"):
        assert (
            f"warning: run folder elsewhere/r: {what} cannot be written (No space left on device); the video video.mp4 is complete"
            in message
        )
    assert (tmp_path / "video.mp4").stat().st_size > 1000
    assert not (tmp_path / "elsewhere").exists()


def test_videos_of_requests_are_kept_even_when_their_run_folder_is_full(command, full, tmp_path, capsys):
    (tmp_path / "requests.jsonl").write_text('{"output": "video.mp4"}\n')
    assert command("requests=requests.jsonl", "name=r") == 0
    assert "videos.json cannot be written" in capsys.readouterr().err
    assert (tmp_path / "video.mp4").is_file()


VIDEO_ON_A_FULL_DISK = """
import sys
from infer_command import FACE, TINY
from sonic.cli import run_command
from sonic.commands import infer_command
given = [*sys.argv[1:], *FACE, *TINY, "name=r", "output=video.mp4"]
sys.exit(run_command(infer_command.ENTRY, infer_command.infer, given))
"""


@pytest.mark.parametrize(("kib", "code"), [(16, 0), (4, 2)])
def test_a_full_disk_is_reported_and_a_finished_video_is_kept(kib, code, weights, tmp_path):
    (tmp_path / "disk").mkdir()
    recording = write_wav(tmp_path / "speech.wav", babble(0.6))
    disk = ["-t", "tmpfs", "-o", f"size={kib}k", "none", str(tmp_path / "disk")]
    given = [f"run.folder={tmp_path / 'disk'}", f"audio={recording}", f"weights={weights}"]
    found = with_mounts([disk], [*script(VIDEO_ON_A_FULL_DISK), *given], folder=tmp_path)
    assert found.returncode == code and "Traceback" not in found.stderr, found.stderr
    assert str(tmp_path / "disk/r") in found.stderr and "No space left on device" in found.stderr
    assert (tmp_path / "video.mp4").exists() == (code == 0)
    assert ("is complete" in found.stderr) == (code == 0)


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_loaded(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sonic.inference.batch.build_components", lambda *_, **__: pytest.fail("something was loaded"))
    (tmp_path / "runs").touch()
    assert command("output=video.mp4", "run.folder=runs", "name=r") == 2
    message = capsys.readouterr().err
    assert "run.folder=runs: the folder runs/r of the run cannot be written" in message and message.count("error:") == 1


def test_a_folder_that_takes_no_files_is_removed(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run = a_run(tmp_path / "runs", "r")
    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(ValueError, match="run.folder=.*No space left on device"):
        run.open()
    run.close()
    assert list(tmp_path.iterdir()) == []
