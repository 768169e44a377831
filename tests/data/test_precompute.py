"""Data sets made by worker processes: independent of the number of workers, and continued after a stop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sonic.config import ModelConfig
from sonic.data import precompute as precompute_module
from sonic.data import shards
from sonic.data.clips import ClipDataset
from sonic.data.data_config import MixConfig, PrecomputeConfig
from sonic.data.precompute import Encoders, encode_person, precompute, recording, talking
from sonic.encoders.logmel import LogMelEncoder
from sonic.vae.motion_vae import WarpAutoencoder

WARP = WarpAutoencoder().eval()


def build_untrained(config: PrecomputeConfig) -> Encoders:
    torch.manual_seed(0)
    return Encoders(LogMelEncoder().eval().encode_audio, WarpAutoencoder().eval())


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    pytest.importorskip("espeakng_loader")
    return PrecomputeConfig(
        folder=str(tmp_path_factory.mktemp("clips")), utterances=2, latent_frames=3, clips_per_utterance=2, workers=1,
        model=ModelConfig(resolution=48),
    )  # fmt: skip


def test_clips_have_portraits_audio_and_motion(config):
    assert precompute(config, build_untrained) == 4
    data = ClipDataset(config.folder, window=3)
    found = data[0, 0]
    assert found["latents"].shape == (16, 3, 6, 6) and found["ref"].shape == (16, 1, 6, 6)
    assert found["audio"].shape == (1, 160, 12) and found["visemes"].shape == (12, 5) and found["head"].shape == (12, 4)
    assert data.statistics()["cell_std"].shape == (6, 6)


SPOKEN = torch.rand(24, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def spoken(tmp_path, monkeypatch):
    """Settings of two clips of 12 frames, whose recording is always the same and needs no synthesiser."""
    message = SimpleNamespace(samples=np.sin(0.1 * np.arange(24 * 640)).astype(np.float32))
    monkeypatch.setattr(precompute_module.voices, "say", lambda rng, split, seconds: message)
    monkeypatch.setattr(precompute_module.voices, "viseme_track", lambda message, frames: SPOKEN.numpy())
    monkeypatch.setattr(precompute_module.voices, "augment", lambda samples, rng: samples + 0.25)
    return PrecomputeConfig(folder=str(tmp_path), latent_frames=3, clips_per_utterance=2, model=ModelConfig(resolution=48))


def test_every_clip_of_a_recording_has_the_features_and_the_visemes_of_its_own_frames(spoken):
    settings = replace(spoken, mix=MixConfig(clean=1.0, silent=0.0))
    encoders = Encoders(lambda samples, frames: torch.arange(float(frames)).view(1, 1, -1), WARP)
    first, second = talking(settings, encoders, np.random.default_rng(0))
    assert torch.cat([clip["audio"].flatten() for clip in (first, second)]).tolist() == list(range(24))
    assert torch.equal(torch.cat([clip["visemes"] for clip in (first, second)]), SPOKEN)
    assert not torch.equal(first["ref"], second["ref"])  # each is spoken by a different person


@pytest.mark.parametrize("moving", [0.0, 1.0])
def test_the_head_moves_in_as_many_clips_as_are_asked_for(spoken, moving):
    settings = replace(spoken, mix=MixConfig(moving=moving))
    encoders = Encoders(lambda samples, frames: torch.zeros(1, 1, frames), WARP)
    assert [bool(clip["head"].any()) for clip in talking(settings, encoders, np.random.default_rng(0))] == [bool(moving)] * 2


@pytest.mark.parametrize(("clean", "silent"), [(1.0, 0.0), (0.0, 0.0), (1.0, 1.0), (0.0, 1.0)])
def test_silent_recordings_have_a_mouth_at_rest_and_only_unclean_ones_are_augmented(spoken, clean, silent):
    samples, visemes = recording(replace(spoken, mix=MixConfig(clean=clean, silent=silent)), np.random.default_rng(0))
    plain = np.zeros(24 * 640, np.float32) if silent else precompute_module.voices.say(None, "", 0).samples
    assert np.array_equal(samples, plain if clean else plain + 0.25)
    assert torch.equal(visemes, torch.zeros(24, 5) if silent else SPOKEN)


def test_head_motion_is_in_the_latents_from_the_frame_where_it_starts():
    """People are encoded a few frames at a time; each part has its own visemes and head motion."""
    torch.manual_seed(0)
    person = precompute_module.draw_face.draw_identity(np.random.default_rng(0), 48, split="train", photographs=0)
    visemes, still = torch.zeros(16, 5), torch.zeros(16, 4)
    turned, open_late = still.clone(), visemes.clone()
    turned[12:, 1], open_late[12:, 0] = 0.1, 1.0
    made = [encode_person(WARP, person, visemes=v, head=h)[0] for v, h in ((visemes, still), (visemes, turned), (open_late, still))]
    assert made[0].shape == (16, 4, 6, 6)
    for changed in made[1:]:
        assert ((changed - made[0]).abs().amax((0, 2, 3)) > 1e-4).tolist() == [False, False, False, True]


def _children(parent):
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "stat").read_text().rpartition(")")[2].split()[1] == str(parent):
                found.append(folder.name)
        except OSError:
            continue  # it ended meanwhile
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to see the workers")
def test_no_worker_outlives_the_process_it_works_for(tmp_path):
    script = f"""
from sonic.data.precompute import precompute
from sonic.data.data_config import PrecomputeConfig
from sonic.training.clip_encoders import build_encoders

if __name__ == "__main__":
    config = PrecomputeConfig(
        folder={str(tmp_path)!r}, kind="spoken", utterances=10**4, latent_frames=3, clips_per_utterance=1, workers=1
    )
    precompute(config, build_encoders)
"""
    (tmp_path / "make.py").write_text(script)
    paths = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    boss = subprocess.Popen([sys.executable, str(tmp_path / "make.py")], stderr=subprocess.DEVNULL, env=paths)
    while not (workers := _children(boss.pid)) or not list(tmp_path.glob("shard_*")):
        time.sleep(0.2)
    boss.kill()
    boss.wait()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{worker}").exists() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


def test_a_stopped_run_makes_only_what_is_missing(config, tmp_path):
    more = replace(config, folder=str(tmp_path), utterances=18, kind="spoken", latent_frames=3, clips_per_utterance=1, workers=0)
    precompute(more, build_untrained)
    (tmp_path / "shard_00001.safetensors").unlink()
    (tmp_path / "index.json").unlink()
    kept = (tmp_path / "shard_00000.safetensors").stat().st_mtime_ns
    assert precompute(more, build_untrained) == 18
    assert (tmp_path / "shard_00000.safetensors").stat().st_mtime_ns == kept
    assert len(ClipDataset(tmp_path, window=3)) == 18


def encoded_by(name):
    return lambda config: {"autoencoder_hash": "same", "speech_hash": name}


def build_first(config: PrecomputeConfig) -> Encoders:
    return replace(build_untrained(config), hashes=encoded_by("first")(config))


def build_second(config: PrecomputeConfig) -> Encoders:
    encoders = replace(build_untrained(config), hashes=encoded_by("second")(config))
    return replace(encoders, encode_audio=lambda samples, frames: 1 + build_untrained(config).encode_audio(samples, frames))


def test_clips_that_are_made_again_are_those_of_a_new_folder(config, tmp_path):
    own = replace(config, folder=str(tmp_path / "again"), utterances=2, workers=0)
    anew = replace(own, folder=str(tmp_path / "anew"))
    precompute(own, build_first, encoded_by("first"))
    for folder in (own, anew):
        assert precompute(folder, build_second, encoded_by("second")) == 4
    for index in range(4):
        ours, expected = ClipDataset(own.folder)[index, 0], ClipDataset(anew.folder)[index, 0]
        assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_clips_of_an_older_speech_encoder_are_made_again(config, tmp_path, caplog):
    own = replace(config, folder=str(tmp_path), utterances=1, workers=0)
    assert precompute(own, build_first, encoded_by("first")) == 2
    index = json.loads((tmp_path / "index.json").read_text())
    assert (index["autoencoder_hash"], index["speech_hash"], index["fps"]) == ("same", "first", 25)
    shard = tmp_path / "shard_00000.safetensors"
    kept, first = shard.stat().st_mtime_ns, ClipDataset(tmp_path)[0, 0]["audio"]
    precompute(own, build_second)  # without hashes nothing is outdated
    precompute(own, build_first, encoded_by("first"))
    assert shard.stat().st_mtime_ns == kept and "made again" not in caplog.text
    assert precompute(own, build_second, encoded_by("second")) == 2
    assert "1 shards" in caplog.text and "they are made again" in caplog.text
    assert torch.allclose(ClipDataset(tmp_path)[0, 0]["audio"], first + 1, atol=0.01)
    assert json.loads((tmp_path / "index.json").read_text())["speech_hash"] == "second"


def test_clips_that_are_half_made_again_are_refused_until_the_rest_is(config, tmp_path, monkeypatch):
    own = replace(config, folder=str(tmp_path), utterances=17, clips_per_utterance=1, workers=0)
    precompute(own, build_first, encoded_by("first"))
    real = precompute_module.write_shard

    def stopped(path, *given, **metadata):
        if path.name != "shard_00000.safetensors":
            raise KeyboardInterrupt
        real(path, *given, **metadata)

    with monkeypatch.context() as patch:
        patch.setattr(precompute_module, "write_shard", stopped)
        with pytest.raises(KeyboardInterrupt):
            precompute(own, build_second, encoded_by("second"))
    with pytest.raises(ValueError, match=r"two encoders.*finish sonic precompute"):
        ClipDataset(tmp_path)
    assert precompute(own, build_second, encoded_by("second")) == 17 == len(ClipDataset(tmp_path))


def test_shards_without_hashes_of_encoders_are_kept(config, tmp_path, caplog):
    own = replace(config, folder=str(tmp_path), utterances=16, clips_per_utterance=1, workers=0)
    precompute(own, build_untrained)
    kept = (tmp_path / "shard_00000.safetensors").stat().st_mtime_ns
    precompute(own, build_first, encoded_by("first"))
    assert (tmp_path / "shard_00000.safetensors").stat().st_mtime_ns == kept
    assert "speech_hash" not in json.loads((tmp_path / "index.json").read_text())
    precompute(replace(own, utterances=17), build_first, encoded_by("first"))
    assert "1 older shards" in caplog.text and json.loads((tmp_path / "index.json").read_text())["speech_hash"] == "first"


def test_a_folder_with_clips_of_other_options_is_refused(config):
    precompute(config, build_untrained)
    for other in ({"split": "test"}, {"seed": 9}, {"latent_frames": config.latent_frames * 2}):
        with pytest.raises(ValueError, match=f"not {next(iter(other))}="):
            precompute(replace(config, **other), build_untrained)


def test_with_more_utterances_the_last_shard_is_made_again(tmp_path):
    settings = {"kind": "spoken", "folder": str(tmp_path / "voices"), "latent_frames": 6, "clips_per_utterance": 1, "workers": 0}
    assert precompute(PrecomputeConfig(utterances=2, **settings), build_untrained) == 2
    assert precompute(PrecomputeConfig(utterances=5, **settings), build_untrained) == 5


def test_an_unknown_kind_names_the_choices(config):
    with pytest.raises(ValueError, match="talking"):
        precompute(replace(config, kind="singing"), build_untrained)


@pytest.mark.parametrize(
    ("gpus", "workers", "devices"),
    [(4, -1, [0, 1, 2, 3]), (2, 5, [0, 1, 0, 1, 0]), (4, 2, [0, 1]), (0, -1, [None, None]), (0, 3, [None, None, None])],
)
def test_every_worker_has_a_gpu_of_its_own_while_there_are_some(gpus, workers, devices, monkeypatch):
    current = []

    class Here:
        def __init__(self, prepare):
            current.append(None)
            prepare()

        def call(self, make, job):
            make(job)

        stop = close = lambda self: None

    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda gpu: current.__setitem__(-1, gpu))
    monkeypatch.setattr(shards, "Worker", Here)
    done = []
    assert len(list(shards.run_in_workers(done.append, range(8), workers))) == 8
    assert (current, sorted(done)) == (devices, list(range(8)))
