"""A folder of the user's own videos: usable segments become clips, the others are reported with a reason."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from run_files import read_scalars
from safetensors import safe_open
from safetensors.torch import save_file
from skimage import data
from video_files import astronaut, delayed, speech, talking, write

from sonic.cli import Entry, run_command
from sonic.commands import precompute_command
from sonic.config import AudioConfig, ModelConfig, MotionConfig, RolloutConfig, TextConfig, TrunkConfig
from sonic.data import clips
from sonic.data.clips import ClipDataset
from sonic.data.data_config import FootageConfig, PrecomputeConfig
from sonic.data.own_videos import REPORT
from sonic.data.precompute import precompute
from sonic.training.build import run_training
from sonic.training.clip_encoders import build_encoders, clip_hashes
from sonic.training.objective_config import FlowMatchConfig
from sonic.training.train_config import BudgetConfig, DataConfig, LogConfig, TrainConfig

ROOT = Path(__file__).resolve().parents[2]

FRAMES = 2 * 48 + 1  # two clips of twelve latent frames, and the frame before them


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("espeakng_loader")
    root = tmp_path_factory.mktemp("videos")
    samples, visemes = speech(1, FRAMES)
    pixels = talking(visemes)
    (root / "inside").mkdir()
    good = write(root / "inside" / "good.mp4", pixels, samples)
    write(root / "late.mp4", pixels, delayed(samples, 0.5))
    write(root / "dubbed.mp4", pixels, speech(2, FRAMES)[0])
    write(root / "slide.mp4", np.repeat(astronaut()[None], FRAMES, 0), samples)
    write(root / "silent.mp4", pixels, np.zeros_like(samples))
    write(root / "mute.mp4", pixels, None)
    write(root / "short.mp4", pixels[:20], samples[:12800])
    write(root / "nobody.mp4", np.repeat(data.brick()[None, :160, :160, None], FRAMES // 2 + 1, 0).repeat(3, -1), samples)
    whole = good.read_bytes()
    (root / "broken.mp4").write_bytes(whole[: len(whole) // 2])
    (root / "inside" / "good.txt").write_text("a person speaks to the camera")
    (root / "notes.txt").write_text("not a video")
    return root


@pytest.fixture(scope="module")
def config(folder, tmp_path_factory):
    made = PrecomputeConfig(
        folder=str(tmp_path_factory.mktemp("clips")), latent_frames=12, workers=0, data=FootageConfig(source=str(folder)),
        model=ModelConfig(resolution=96),
    )  # fmt: skip
    precompute(made, build_encoders)
    return made


def report(config):
    with open(f"{config.folder}/{REPORT}") as lines:
        return [json.loads(line) for line in lines]


def test_every_video_is_kept_or_left_out_for_its_reason(config):
    found = Counter((line["video"], line["reason"]) for line in report(config))
    assert found == {
        ("inside/good.mp4", ""): 2,
        ("late.mp4", "sound and mouth are apart in time"): 2,
        ("dubbed.mp4", "the mouth does not follow the sound"): 2,
        ("slide.mp4", "the mouth does not move"): 2,
        ("silent.mp4", "silent"): 2,
        ("mute.mp4", "no sound"): 1,
        ("short.mp4", "shorter than a clip of 1.9 s"): 1,
        ("nobody.mp4", "no face"): 1,
        ("broken.mp4", "damaged"): 1,
    }


def test_the_report_gives_the_lag_between_mouth_and_sound(config):
    lines = {line["video"]: line for line in report(config)}
    good, late = lines["inside/good.mp4"], lines["late.mp4"]
    assert good["sync_correlation"] > 0.5 and abs(good["mouth_late_s"]) < 0.1
    assert late["mouth_late_s"] == pytest.approx(-0.5, abs=0.1)
    assert "cannot be decoded" in lines["broken.mp4"]["details"]


def test_clips_have_all_tensors_that_a_training_needs(config):
    made = ClipDataset(config.folder, window=12)
    assert len(made) == 2
    found = made[1, 0]
    assert found["latents"].shape == (16, 12, 12, 12) and found["ref"].shape == (16, 1, 12, 12)
    assert found["audio"].shape == (1, 160, 48) and found["head"].shape == (48, 4) and "text" not in found
    moves = made.statistics()["cell_std"]
    assert moves[5:10, 4:8].mean() > 1.5 * moves[:4].mean()  # mouth and chin, against the forehead


def training(config, **objective):
    model = replace(
        config.model, trunk=TrunkConfig(32, 64, 2, 2, [1, 2, 2], freq_dim=32), audio=AudioConfig(160, 1, 2, [0]), text=TextConfig(8, 2),
        motion=MotionConfig(), rollout=RolloutConfig(block_frames=3, window_blocks=2),
    )  # fmt: skip
    return TrainConfig(
        model=model, objective=FlowMatchConfig(schedule=[1.0], **objective), data=DataConfig(folder=config.folder, window=6),
        budget=BudgetConfig(max_steps=2, batch_size=2), log=LogConfig(every_steps=1, bar=False),
    )  # fmt: skip


def test_a_training_runs_on_clips_of_own_videos(config, tmp_path):
    assert run_training(training(config, viseme_weight=0.0), tmp_path / "run").steps == 2
    assert all(np.isfinite(line["student/loss"]) for line in read_scalars(tmp_path / "run"))


def test_training_on_clips_without_visemes_asks_for_viseme_weight_0(config, tmp_path):
    with pytest.raises(ValueError, match="objective.viseme_weight=0"):
        run_training(training(config), tmp_path / "run")


def test_latents_of_other_weights_are_refused(config, tmp_path):
    index = json.loads((Path(config.folder) / "index.json").read_text())
    for file in Path(config.folder).glob("*.safetensors"):
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "index.json").write_text(json.dumps({**index, "autoencoder_hash": "0123456789abcdef"}))
    with pytest.raises(ValueError, match=f"another autoencoder .*0123456789abcdef.*{index['autoencoder_hash']}.*precompute"):
        run_training(training(replace(config, folder=str(tmp_path)), viseme_weight=0.0), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_clips_of_another_speech_encoder_are_refused_and_made_again(config, tmp_path):
    index = clips.read_index(Path(config.folder))
    assert len(index["speech_hash"]) == 16 and index["fps"] == 25
    own, older = replace(config, folder=str(tmp_path)), "0123456789abcdef"
    shutil.copytree(config.folder, tmp_path, dirs_exist_ok=True)
    for shard in tmp_path.glob("video_*"):
        with safe_open(shard, framework="pt") as file:
            tensors, expected = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
        save_file(tensors, shard, metadata={**expected, "speech_hash": json.dumps(older)})
    clips.write_index(tmp_path, **{**index, "speech_hash": older})
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("video_*")}
    with pytest.raises(ValueError, match=f"another speech encoder .*{older}.*{index['speech_hash']}.*in place"):
        run_training(training(own, viseme_weight=0.0), tmp_path / "run")
    assert precompute(own, build_encoders, clip_hashes) == 2
    made = [name for name, modified in before.items() if (tmp_path / name).stat().st_mtime_ns != modified]
    assert made == [index["clips"][0]["shard"]]  # the others hold no clip
    assert clips.read_index(tmp_path) == index
    assert run_training(training(own, viseme_weight=0.0), tmp_path / "run").steps == 2


def test_a_text_that_is_not_utf8_costs_its_own_video_and_is_named(config, folder, tmp_path):
    own = tmp_path / "mine"
    own.mkdir()
    for name in ("good", "short"):
        (own / f"{name}.mp4").symlink_to(next(folder.rglob(f"{name}.mp4")))
        (own / f"{name}.txt").write_bytes("Grüße".encode("latin-1"))
    expected = replace(config, folder=str(tmp_path / "clips"), data=replace(config.data, source=str(own)))
    with pytest.raises(ValueError, match=r"gave no clip: its text is not UTF-8 \(1\), shorter than a clip of 1.9 s \(1\)"):
        precompute(expected, build_with_reader)
    assert f"{own / 'good.txt'} is not UTF-8 text" in report(expected)[0]["details"]


def build_with_reader(config):
    return replace(build_encoders(config), read=lambda prompt: torch.zeros(2, 8))


def test_existing_shards_are_kept_and_videos_can_be_added(config, folder):
    before = {path.name: path.stat().st_mtime_ns for path in Path(config.folder).glob("video_*")}
    new = write(folder / "tiny.mp4", talking(speech(2, 10)[1]), speech(2, 10)[0])
    try:
        assert precompute(config, build_encoders) == 2
    finally:
        new.unlink()
    after = {path.name: path.stat().st_mtime_ns for path in Path(config.folder).glob("video_*")}
    assert before.items() <= after.items() and len(after) == len(before) + 1


def test_a_folder_with_clips_of_other_videos_is_refused_and_unchanged(config, tmp_path):
    with pytest.raises(ValueError, match=r"made with source=.*name another folder="):
        precompute(replace(config, data=FootageConfig(source=str(tmp_path))), build_encoders)


def command(*argv):
    entry = Entry("precompute", PrecomputeConfig, collections=("precompute",), location=lambda config: (str(ROOT / "runs"), "none"))
    return run_command(entry, precompute_command.make, [*argv, "workers=0"])


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "holds no video"),
        ({"a.mp4": b""}, r"gave no clip: damaged \(1\).*report.jsonl"),
        ({"a.txt": b"hello"}, "holds no video"),
        (None, "is no folder"),
    ],
)
def test_a_folder_without_a_usable_video_is_reported(files, expected, tmp_path, capsys, caplog):
    source = tmp_path / "mine"
    for name, content in (files or {}).items():
        source.mkdir(exist_ok=True)
        (source / name).write_bytes(content)
    if files == {}:
        source.mkdir()
    assert command(f"data.source={source}", f"folder={tmp_path / 'clips'}") == 2
    output = capsys.readouterr().err + caplog.text
    assert re.search(expected, output) and "Traceback" not in output
    assert not (tmp_path / "clips/index.json").exists()


def test_spoken_clips_are_not_made_of_videos(folder):
    with pytest.raises(ValueError, match="leave one of them out"):
        PrecomputeConfig(kind="spoken", data=FootageConfig(source=str(folder)))
