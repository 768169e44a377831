"""File names: `~`, bytes that are not UTF-8, links, pipes, and the target of a video."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sonic.checkpoint.convert_config import ConvertConfig
from sonic.cli import Entry, compose, run_command
from sonic.data.data_config import PrecomputeConfig
from sonic.data.video import VideoWriter, check_output
from sonic.evaluation.judge_config import JudgeConfig
from sonic.inference.infer_config import InferConfig
from sonic.parallel.parallel_config import PlanConfig
from sonic.system.paths import check_input, expanded, file_key, printable

INFER = Entry("infer", InferConfig)
BYTES = os.fsdecode(b"caf\xe9")


def writable(path: Path) -> Path:
    return check_output(path, 16, 16, num_frames=1)


def written(path: Path) -> Path:
    import numpy as np

    with VideoWriter(path, 16, 16, num_frames=1) as writer:
        writer.write(np.zeros((1, 16, 16, 3), np.uint8))
    return path


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("~/a.png", "{home}/a.png"),
        ("~", "{home}"),
        ("~/a.wav+~/b.wav", "{home}/a.wav+{home}/b.wav"),
        ("./~/a.png", "./~/a.png"),
        ("~no such person/a", "~no such person/a"),
        ("~backup.png", "~backup.png"),
    ],
)
def test_a_tilde_is_expanded_where_a_shell_would_expand_it(typed, meant, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expanded(typed) == meant.format(home=tmp_path)


@pytest.mark.parametrize(
    ("schema", "options"),
    [
        (InferConfig, ["image", "audio", "output", "requests", "run.folder", "motion.pose", "model.weights", "weights", "model.lora.path"]),
        (PrecomputeConfig, ["folder", "data.source", "autoencoder"]),
        (JudgeConfig, ["mp4", "image", "audio", "json"]),
        (PlanConfig, ["json"]),
    ],
)
def test_every_option_that_names_a_file_expands_a_tilde(schema, options, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    name = {InferConfig: "infer", PrecomputeConfig: "precompute", JudgeConfig: "judge", PlanConfig: "plan"}[schema]
    needed = ["mp4=a.mp4"] if schema is JudgeConfig else []
    for option in options:
        value = compose(Entry(name, schema), [*needed, f"{option}=~/x"])
        for part in {"weights": "model.weights"}.get(option, option).split("."):
            value = getattr(value, part)
        assert value == f"{tmp_path}/x", option


def test_options_of_masks_and_conversions_expand_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compose(INFER, ["face.masks=[~/a.png,~/b.png]"]).face.masks == [f"{tmp_path}/a.png", f"{tmp_path}/b.png"]
    assert compose(INFER, ["face.masks=null"]).face.masks is None
    found = compose(Entry("convert", ConvertConfig), ["source=~/a", "output=~/b", "live_avatar=~/c", "model=wan_s2v_14b"])
    assert (found.source, found.output, found.lora.path) == (f"{tmp_path}/a", f"{tmp_path}/b", f"{tmp_path}/c")


def test_a_list_may_hold_names_that_are_not_utf8():
    assert compose(INFER, [f"face.masks=[{BYTES}.png]"]).face.masks == [f"{BYTES}.png"]


def test_any_file_name_can_be_printed():
    assert printable(f"{BYTES}.png") == "caf\\xe9.png" and printable("é \ud800") == "é \\ud800"
    printable(BYTES).encode()


def test_a_name_that_is_not_utf8_in_an_error_is_shown(capsys):
    def job(config, run) -> None:
        raise ValueError(f"image={config.image} is no picture")

    assert run_command(INFER, job, [f"image={BYTES}"]) == 2
    assert "image=caf\\xe9 is no picture" in capsys.readouterr().err


def test_two_names_of_a_file_are_recognised_as_the_same_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inside").mkdir()
    (tmp_path / "a").touch()
    os.link("a", "hard")
    os.symlink("a", "soft")
    os.symlink("missing", "dangling")
    os.symlink("inside", "folder")
    assert {file_key(name) for name in ("a", "./a", "inside/../a", tmp_path / "a", "hard", "soft")} == {file_key("a")}
    assert file_key("missing") == file_key("inside/../missing") == file_key("dangling") != file_key("a")
    assert file_key("folder/new") == file_key("inside/new")


@pytest.mark.parametrize("name", ["pipe", "/dev/null", "loop", "x" * 300, "a\0b", "\ud800"])
def test_an_input_that_is_no_file_is_refused_before_it_is_opened(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    os.symlink("loop", "loop")
    with pytest.raises(ValueError, match=r"^image="):
        check_input(name, "image")


def test_a_video_is_written_through_a_link_which_stays(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far/old.mp4").write_bytes(b"old")
    for link, target in (("a.mp4", "far/old.mp4"), ("b.mp4", "far/new.mp4")):
        (tmp_path / link).symlink_to(target)
        assert writable(tmp_path / link) == tmp_path / target
        written(tmp_path / link)
        assert (tmp_path / link).is_symlink() and len((tmp_path / target).read_bytes()) > 100
    assert sorted(path.name for path in (tmp_path / "far").iterdir()) == ["new.mp4", "old.mp4"]


def test_a_video_replaces_only_one_name_of_a_hard_linked_file(tmp_path):
    (tmp_path / "kept").write_bytes(b"old")
    os.link(tmp_path / "kept", tmp_path / "a.mp4")
    written(tmp_path / "a.mp4")
    assert (tmp_path / "kept").read_bytes() == b"old"


def test_what_cannot_become_a_video_is_refused_with_the_option(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.mp4")
    os.symlink("/dev/null", "null.mp4")
    os.symlink("loop.mp4", "loop.mp4")
    os.symlink("nowhere/a.mp4", "lost.mp4")
    os.symlink(".", "around")
    before = sorted(os.listdir())
    for name in ("pipe.mp4", "null.mp4", "loop.mp4", "lost.mp4", "x" * 252 + ".mp4", "x" * 300 + ".mp4", "a\0.mp4", "\ud800.mp4"):
        with pytest.raises(ValueError, match=r"^output="):
            writable(Path(name))
    assert writable(Path("around/around/a.mp4"))
    assert writable(Path("x" * 251 + ".mp4"))
    assert sorted(os.listdir()) == before


def test_a_read_only_video_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").touch(0o444)
    monkeypatch.setattr("sonic.system.paths.os.access", lambda path, mode: False)  # which root never sees
    with pytest.raises(ValueError, match="exists and is read-only"):
        writable(tmp_path / "a.mp4")
