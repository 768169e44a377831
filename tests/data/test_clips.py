"""Clips on disk and the order in which they are sampled."""

from __future__ import annotations

import json
from functools import partial
from itertools import islice
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from sonic.config import AudioConfig, ModelConfig, RolloutConfig
from sonic.data import clips


@pytest.fixture
def folder(tmp_path):
    tensors, entries = {}, []
    for number, length in enumerate((4, 6)):
        clip = {
            "latents": torch.arange(length).float().reshape(1, length, 1, 1).repeat(2, 1, 3, 3).half(),
            "ref": torch.full((2, 1, 3, 3), float(number)),
            "audio": torch.arange(4 * length).float().reshape(1, 1, -1),
            "visemes": torch.arange(4 * length).float().reshape(-1, 1).repeat(1, 5),
        }
        tensors |= {f"c{number}/{key}": value for key, value in clip.items()}
        entries.append({"name": f"c{number}", "shard": "a.safetensors", "latent_frames": length, "tensors": sorted(clip)})
    save_file(tensors, tmp_path / "a.safetensors")
    clips.write_index(tmp_path, entries, kind="talking")
    return tmp_path


def test_a_window_is_cut_at_the_same_time_from_everything(folder):
    data = clips.ClipDataset(folder, window=2)
    starts = set()
    for seed in range(60):
        found = data[1, seed]
        start = int(found["latents"][0, 0, 0, 0])
        starts.add(start)
        assert found["latents"].shape == (2, 2, 3, 3) and found["latents"].dtype == torch.float32
        assert_close(found["audio"][0, 0], torch.arange(4 * start, 4 * start + 8).float())
        assert_close(found["visemes"][:, 0], torch.arange(4 * start, 4 * start + 8).float())
        assert found["ref"].shape == (2, 1, 3, 3)
    assert starts == {0, 1, 2, 3, 4}


def test_without_a_window_clips_come_whole(folder):
    assert clips.ClipDataset(folder)[0, 0]["latents"].shape[1] == 4


def test_clips_shorter_than_the_window_are_left_out(folder):
    assert len(clips.ClipDataset(folder, window=5)) == 1
    with pytest.raises(ValueError, match="smaller window"):
        clips.ClipDataset(folder, window=7)


def test_a_folder_without_clips_says_how_to_make_them(tmp_path):
    with pytest.raises(ValueError, match=r"sonic precompute"):
        clips.ClipDataset(tmp_path)


def test_every_epoch_draws_each_clip_once_and_in_another_order():
    drawn = [index for batch in islice(clips.sample_order(10, 5, seed=1), 4) for index, _ in batch]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]


def test_the_order_resumes_in_the_middle_of_an_epoch():
    whole = list(islice(clips.sample_order(7, 3, seed=4), 12))
    assert list(islice(clips.sample_order(7, 3, seed=4, start=5), 7)) == whole[5:]


def test_ranks_share_the_order_that_one_rank_would_see():
    alone = list(islice(clips.sample_order(9, 4, seed=2), 6))
    shared = [list(islice(clips.sample_order(9, 2, seed=2, rank=rank, ranks=2), 6)) for rank in (0, 1)]
    assert [a + b for a, b in zip(*shared, strict=True)] == alone


def test_workers_make_the_same_batches_as_the_loop_itself(folder):
    data = clips.ClipDataset(folder, window=2)
    order = partial(clips.sample_order, len(data), 3, seed=0, start=1)
    here, there = (list(islice(clips.batches(data, order, workers=workers), 3)) for workers in (0, 1))
    for a, b in zip(here, there, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_pose_latents_hold_value_j_of_frame_f_in_channel_4j_plus_f():
    head = torch.randn(2, 8, 4)
    pose = clips.pose_latents(head, 3, 5)
    assert pose.shape == (2, 16, 2, 3, 5)
    for t, f, j in ((0, 0, 0), (1, 3, 2), (0, 1, 3)):
        assert torch.equal(pose[:, 4 * j + f, t, 1, 2], head[:, 4 * t + f, j])


def test_the_index_is_readable_json(folder):
    assert json.loads((folder / "index.json").read_text())["kind"] == "talking"


def test_clips_of_another_autoencoder_or_size_are_reported(tmp_path):
    save_file({"a/latents": torch.zeros(16, 6, 4, 4), "a/audio": torch.zeros(1, 160, 24)}, tmp_path / "a.safetensors")
    entries = [{"name": "a", "shard": "a.safetensors", "latent_frames": 6, "tensors": ["latents", "audio"]}]
    clips.write_index(tmp_path, entries, family="preview")
    clips.ClipDataset(tmp_path).check(ModelConfig())
    with pytest.raises(ValueError, match="latents of the family preview"):
        clips.ClipDataset(tmp_path).check(ModelConfig(family="wan"))
    with pytest.raises(ValueError, match=r"\(16, 1, 160\).*needs \(16, 25, 160\)"):
        clips.ClipDataset(tmp_path).check(ModelConfig(audio=AudioConfig(num_audio_layers=25)))
    clips.write_index(tmp_path, entries, autoencoder="warp")  # as before families had names
    clips.ClipDataset(tmp_path).check(ModelConfig())


@pytest.fixture
def latents(tmp_path):
    save_file({"a/latents": torch.zeros(16, 6, 4, 4), "a/audio": torch.zeros(1, 160, 24)}, tmp_path / "a.safetensors")
    return [{"name": "a", "shard": "a.safetensors", "latent_frames": 6, "tensors": ["latents", "audio"]}]


def test_clips_at_another_rate_are_reported(latents, tmp_path):
    clips.write_index(tmp_path, latents, family="preview", fps=16)
    with pytest.raises(ValueError, match=r"clips of 16 frames a second, model=preview makes 25; .*another folder="):
        clips.ClipDataset(tmp_path).check(ModelConfig())
    clips.ClipDataset(tmp_path).check(ModelConfig(rollout=RolloutConfig(fps=16)))


@pytest.mark.parametrize(
    ("name", "expected"), [("autoencoder_hash", "clips of another autoencoder"), ("speech_hash", "clips of another speech encoder")]
)
def test_clips_of_other_weights_are_reported(latents, name, expected, tmp_path):
    own = {"autoencoder_hash": "aaaa", "speech_hash": "bbbb"}
    clips.write_index(tmp_path, latents, **{**own, name: "cccc"})
    with pytest.raises(ValueError, match=rf"{expected} \(weights cccc\) than model=preview has \(weights {own[name]}\).*sonic precompute"):
        clips.ClipDataset(tmp_path).check(ModelConfig(), lambda config: own)
    clips.ClipDataset(tmp_path).check(ModelConfig(), lambda config: {**own, name: ""})  # unknown hash


def test_clips_that_do_not_say_what_made_them_are_taken_to_fit_and_that_is_reported(latents, tmp_path, caplog):
    clips.write_index(tmp_path, latents, autoencoder_hash="aaaa")
    clips.ClipDataset(tmp_path).check(ModelConfig(), lambda config: {"autoencoder_hash": "aaaa", "speech_hash": "bbbb"})
    assert "does not say what its clips were made with (speech_hash, fps)" in caplog.text


def test_workers_do_not_grow_over_two_thousand_batches(tmp_path):
    save_file({f"{n}/latents": torch.zeros(4, 6, 4, 4) for n in range(8)}, tmp_path / "a.safetensors")
    entries = [{"name": str(n), "shard": "a.safetensors", "latent_frames": 6, "tensors": ["latents"]} for n in range(8)]
    clips.write_index(tmp_path, entries)
    stream = clips.batches(clips.ClipDataset(tmp_path, 3), partial(clips.sample_order, 8, 2, seed=0), workers=1)
    sizes = []
    for count, _ in zip(range(2300), stream, strict=False):
        if count in (300, 2299):
            sizes.append(sum(_resident(child.pid) for child in active_children()))
    assert 0 < sizes[1] < 1.03 * sizes[0]


def _resident(pid):
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1])
