"""A bad video, shard or worker process never affects the others."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from video_files import FPS, speech, talking, write

from sonic.checkpoint.tensor_files import survey, weights_hash
from sonic.config import ModelConfig
from sonic.data import clips, own_videos
from sonic.data.clips import ClipDataset
from sonic.data.data_config import FootageConfig, PrecomputeConfig
from sonic.data.own_videos import REPORT
from sonic.data.precompute import precompute
from sonic.data.shards import DamagedShard, read_metadata, run_in_workers, write_shard
from sonic.system.worker import Crashed
from sonic.training.clip_encoders import build_encoders

FRAMES = 49  # a clip of twelve latent frames, and the frame before it
LOAD, LATENTS = own_videos.load_soundtrack, 12


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    pytest.importorskip("espeakng_loader")
    position = tmp_path_factory.mktemp("videos")
    samples, visemes = speech(1, FRAMES + FPS)
    good = write(position / "a_good.mp4", talking(visemes[:FRAMES]), samples[: 16_000 * FRAMES // FPS])
    for name in ("b_crash", "c_bug", "d_gone", "e_good"):
        (position / f"{name}.mp4").write_bytes(good.read_bytes())
    return position


def damaged(path):
    """Stand-in for the reader of sound tracks, which fails in a way named by the video."""
    if "crash" in path.name:
        signal.raise_signal(signal.SIGSEGV)
    if "bug" in path.name:
        raise KeyError("lost")
    if "gone" in path.name:
        raise PermissionError(13, "Permission denied", str(path))
    return LOAD(path)


def build_damaged(config):
    own_videos.load_soundtrack = damaged
    return build_encoders(config)


def build_mended(config):
    own_videos.load_soundtrack = LOAD
    return build_encoders(config)


def given(folder: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in (folder / REPORT).read_text().splitlines()]
    return {line["video"]: line["reason"] for line in lines}


def config_of(source: Path, folder: Path, **changes) -> PrecomputeConfig:
    made = PrecomputeConfig(folder=str(folder), latent_frames=LATENTS, workers=1, data=FootageConfig(source=str(source)))
    return replace(made, model=ModelConfig(resolution=96), **changes)


def test_a_video_that_crashes_its_worker_costs_no_other_video_in_any_run(source, tmp_path):
    config = config_of(source, tmp_path / "clips")
    for _ in range(2):
        assert precompute(config, build_damaged) == 2
        assert given(tmp_path / "clips") == {
            "a_good.mp4": "",
            "b_crash.mp4": "the decoder crashed",
            "c_bug.mp4": "a fault of the program",
            "d_gone.mp4": "cannot be read",
            "e_good.mp4": "",
        }
    message = {line["video"]: line.get("details", "") for line in map(json.loads, (tmp_path / "clips" / REPORT).read_text().splitlines())}
    assert "b_crash.mp4: the decoder crashed on this file (SIGSEGV); convert it" in message["b_crash.mp4"]
    assert message["c_bug.mp4"].startswith("KeyError: 'lost' (test_lost_videos.py:")
    kept = [entry["shard"] for entry in clips.read_index(tmp_path / "clips")["clips"]]
    before = [(tmp_path / "clips" / name).stat().st_mtime_ns for name in kept]
    assert precompute(config, build_mended) == 5  # a fixed program makes the clips that failed before
    assert [(tmp_path / "clips" / name).stat().st_mtime_ns for name in kept] == before


def test_a_shard_that_is_cut_short_is_made_again(source, tmp_path, caplog):
    folder, own = tmp_path / "clips", tmp_path / "own"
    own.mkdir()
    (own / "a.mp4").symlink_to(source / "a_good.mp4")
    config = config_of(own, folder, workers=0)
    assert precompute(config, build_mended) == 1
    shard = folder / clips.read_index(folder)["clips"][0]["shard"]
    shapes, entries = {name: tensor.shape for name, tensor in load_file(shard).items()}, read_metadata(shard)["clips"]
    os.truncate(shard, 1000)
    with pytest.raises(ValueError, match=f"{shard.name} is damaged or gone .*repeat"):
        ClipDataset(folder)[0, 0]
    assert precompute(config, build_mended) == 1
    assert {name: tensor.shape for name, tensor in load_file(shard).items()} == shapes and read_metadata(shard)["clips"] == entries
    assert ClipDataset(folder)[0, 0]["latents"].isfinite().all()
    assert f"{shard} is damaged" in caplog.text


def test_a_drawn_shard_that_is_cut_short_is_made_again(tmp_path, caplog):
    pytest.importorskip("espeakng_loader")
    config = PrecomputeConfig(kind="spoken", folder=str(tmp_path), utterances=1, latent_frames=3, clips_per_utterance=1, workers=0)
    assert precompute(config, build_encoders) == 1
    shard = next(tmp_path.glob("shard_*"))
    metadata, size = read_metadata(shard), shard.stat().st_size
    for cut in (1000, 4, 0):
        os.truncate(shard, cut)
        caplog.clear()
        assert precompute(config, build_encoders) == 1
        assert (read_metadata(shard), shard.stat().st_size) == (metadata, size) and f"{shard} is damaged" in caplog.text


def test_damaged_files_are_named(tmp_path):
    write_shard(tmp_path / "a.safetensors", {"x": torch.zeros(100)}, other=1)
    with pytest.raises(DamagedShard, match=r"a\.safetensors is no shard"):
        read_metadata(tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-10])
    for read in (read_metadata, weights_hash, survey):
        with pytest.raises(ValueError, match=r"a\.safetensors"):
            read(tmp_path / "a.safetensors")
    for content in ("{", "[]", "{}", '{"clips": 3}'):
        (tmp_path / "index.json").write_text(content)
        with pytest.raises(ValueError, match=r"index\.json is damaged"):
            ClipDataset(tmp_path)


def end(job: tuple[Path, int]) -> None:
    folder, number = job
    if number == 3:
        os._exit(3)
    (folder / str(number)).touch()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_job_that_kills_its_process_is_reported_and_the_others_are_done(workers, tmp_path):
    lost = []
    jobs = [(tmp_path, number) for number in range(6)]
    assert len(list(run_in_workers(end, jobs, workers, crashed=lambda job, error: lost.append((job[1], str(error)))))) == 6
    assert lost == [(3, "exit code 3")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2", "4", "5"]
    with pytest.raises(Crashed, match="exit code 3"):
        list(run_in_workers(end, jobs, workers))
