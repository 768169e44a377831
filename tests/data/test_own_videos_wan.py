"""The user's own videos for a (miniature) published model: VAE latents of whole pictures, prompts, and a training on them."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from einops import rearrange
from official_folder import write_official
from run_files import read_scalars
from video_files import read_frames, speech, talking, write

from sonic.checkpoint.convert import DIRECTIONS
from sonic.checkpoint.convert_config import ConvertConfig
from sonic.checkpoint.converted import Checkpoint
from sonic.cli import Entry, compose
from sonic.data import clips
from sonic.data.clips import ClipDataset
from sonic.data.data_config import PrecomputeConfig
from sonic.data.image import covering
from sonic.data.precompute import precompute
from sonic.data.video import frames_at
from sonic.training.build import run_training
from sonic.training.clip_encoders import build_encoders
from sonic.training.objective_config import OBJECTIVE_CONFIGS
from sonic.training.train_config import TrainConfig

FRAMES = 49  # at 25 a second, of which 31 remain at 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("espeakng_loader")
    root = tmp_path_factory.mktemp("videos")
    samples, visemes = speech(1, FRAMES)
    pixels = talking(visemes)
    write(root / "good.mp4", pixels, samples)
    (root / "good.txt").write_text("a person speaks to the camera")
    write(root / "high.mp4", pixels[:, :200], samples)
    return root


@pytest.fixture(scope="module")
def config(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("painted")
    write_official(root / "official")
    argv = ["model=wan_s2v_14b", f"source={root / 'official'}", f"output={root / 'ready'}"]
    expected = compose(Entry("convert", ConvertConfig, collections=()), argv)
    DIRECTIONS[expected.to](expected, expected.model)
    argv = ["model=wan_s2v_14b", f"checkpoint={root / 'ready'}", f"data.source={folder}", f"folder={root / 'clips'}"]
    made = compose(Entry("precompute", PrecomputeConfig), [*argv, "data.size=128x128", "latent_frames=7", "workers=0"])
    assert precompute(made, build_encoders) == 2
    return made


def test_latents_are_those_of_the_frames(config):
    found = ClipDataset(config.folder, window=7)[0, 0]
    assert found["latents"].shape == (16, 7, 16, 16) and found["ref"].shape == (16, 1, 16, 16)
    assert found["audio"].shape[-1] == 28 and found["text"].shape == (12, 24)


def test_latents_begin_at_the_time_of_the_audio_features(config, folder):
    """The first frame is the past frame; the latents show the next 28, in order."""
    line = json.loads((Path(config.folder) / "report.jsonl").read_text().splitlines()[0])
    assert (line["video"], line["start_s"], line["seconds"]) == ("good.mp4", 0.06, 1.75)
    shown = [covering(frame, 128, 128) for frame in islice(frames_at(folder / "good.mp4", 16), 29)]
    pixels = rearrange(torch.stack([torch.from_numpy(frame) for frame in shown]), "f h w c -> 1 c f h w").float() / 127.5 - 1
    vae = Checkpoint.open(Path(config.model.weights)).autoencoder(torch.device("cpu"), torch.float32)
    wanted, _ = vae.encode(pixels)
    found = ClipDataset(config.folder, window=7)[0, 0]["latents"]
    torch.testing.assert_close(found, wanted[0, :, 1:], atol=0.01, rtol=0.01)


def test_each_clip_has_the_prompt_of_its_video(config):
    data = ClipDataset(config.folder, window=7)
    spoken, silent = (data[number, 0]["text"] for number in range(2))
    assert spoken.shape == silent.shape and not torch.equal(spoken, silent)
    rows = Checkpoint.open(Path(config.model.weights)).prompt_encoder(12, torch.device("cpu"))("a person speaks to the camera")[0]
    torch.testing.assert_close(spoken[: len(rows)], rows, atol=1e-3, rtol=1e-3)


def training(config, *argv):
    entry = Entry("train", TrainConfig, collections=("train", "distill"), variants={"objective": OBJECTIVE_CONFIGS})
    own = ["budget.max_steps=2", "budget.accumulate=1", "log.every_steps=1", "log.bar=false", "speed.engine=local", "speed.workers=0"]
    sizes = ["data.window=7", "objective.window.past=3", "export=", "speed.precision=float32"]
    return compose(
        entry, ["+train=audio_adapter", f"checkpoint={config.model.weights}", f"data.folder={config.folder}", *own, *sizes, *argv]
    )


def test_an_audio_adapter_trained_on_own_videos_generates_a_video(config, tmp_path, monkeypatch):
    monkeypatch.setattr("sonic.training.samples.AREA", 192 * 192)
    made = training(config, "model.rollout.clip_frames=32", "log.samples_every=2", "log.sample_seconds=2", "log.sample_steps=1")
    made.model = Checkpoint.open(Path(made.model.weights)).config(made.model)
    assert run_training(made, tmp_path / "run").steps == 2
    first, last = read_scalars(tmp_path / "run")
    assert first["student/loss"] > 0 and "video" not in first
    assert sum(1 for _ in read_frames(tmp_path / "run" / last["video"])) == 32 and "eval/sync_correlation" in last


def test_clips_of_another_frame_rate_are_refused(config, tmp_path):
    """Clips of wan_s2v_14b (16 fps) must not be used for Live Avatar (25 fps)."""
    assert clips.read_index(Path(config.folder))["fps"] == 16
    made = training(config, "model.rollout.fps=25")
    with pytest.raises(ValueError, match="clips of 16 frames a second, model=wan_s2v_14b makes 25"):
        run_training(made, tmp_path / "run")


@pytest.mark.parametrize(
    ("file", "expected"), [("VAE", "clips of another autoencoder"), ("model.safetensors", "clips of another speech encoder")]
)
def test_clips_of_other_encoders_are_refused(config, file, expected, tmp_path):
    manifest = Path(config.model.weights) / "manifest.json"
    kept = manifest.read_text()
    spoken = json.loads(kept)
    spoken["sources"] = {name: digest[::-1] if file in name else digest for name, digest in spoken["sources"].items()}
    manifest.write_text(json.dumps(spoken))
    try:
        with pytest.raises(ValueError, match=expected):
            run_training(training(config), tmp_path / "run")
    finally:
        manifest.write_text(kept)
    assert not (tmp_path / "run").exists()


def test_a_face_that_the_size_cuts_off_is_reported(config, folder):
    argv = ["model=wan_s2v_14b", f"checkpoint={config.model.weights}", f"data.source={folder}", f"folder={config.folder}_wide"]
    with pytest.raises(ValueError, match=r"the face does not fit into data.size=512x64 \(2\)"):
        precompute(
            compose(Entry("precompute", PrecomputeConfig), [*argv, "data.size=512x64", "latent_frames=7", "workers=0"]), build_encoders
        )
