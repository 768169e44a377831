"""Segments of videos: each has the frames, sound and speech features of its own time, and its first fault."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from sonic.config import ModelConfig
from sonic.data import own_videos, segments
from sonic.data.data_config import FootageConfig, PrecomputeConfig
from sonic.data.own_videos import clips_of
from sonic.data.segments import Segment, checked_sync, read_segments
from sonic.data.shards import Encoders, read_metadata
from sonic.families import wan
from sonic.types import FaceBox, Mouth, Portrait

FPS, LENGTH = 25, 12  # frames a second, frames of a clip
SAMPLES = 16_000 // FPS  # of a frame


@pytest.fixture
def config(tmp_path) -> PrecomputeConfig:
    (tmp_path / "videos").mkdir()
    return PrecomputeConfig(folder=str(tmp_path), latent_frames=LENGTH // 4, data=FootageConfig(source=str(tmp_path / "videos")))


def numbered(count: int) -> list[np.ndarray]:
    """Frames whose grey level is their number."""
    return [np.full((8, 8, 3), index, np.uint8) for index in range(count)]


def test_segments_are_consecutive_and_each_has_the_frame_before_it(config, monkeypatch):
    monkeypatch.setattr(segments, "frames_at", lambda path, fps: iter(numbered(1 + 2 * LENGTH + 5)))
    seen = []

    def looked(held, samples, config, *, first, fps, frame):
        seen.append([int(frame[0, 0, 0]) for frame in held])
        return Segment(first, len(held) - 1)

    monkeypatch.setattr(segments, "_inspect", looked)
    read = read_segments("video.mp4", np.zeros(0, np.float32), config, fps=FPS, frame=segments.covering_frames)
    found = [(segment.first, segment.frames, segment.fault) for segment in read]
    assert found == [(1, LENGTH, ""), (1 + LENGTH, LENGTH, ""), (1 + 2 * LENGTH, 5, "shorter than a clip of 0.5 s")]
    assert seen == [list(range(LENGTH + 1)), list(range(LENGTH, 2 * LENGTH + 1))]


@pytest.mark.parametrize("frame", [1 + LENGTH, 2 * LENGTH])
def test_the_sound_of_a_segment_is_that_of_its_own_frames(config, frame, monkeypatch):
    """Only one frame of the video is loud, the first or the last of the second segment."""
    monkeypatch.setattr(segments, "frames_at", lambda path, fps: iter(numbered(1 + 3 * LENGTH)))
    samples = np.zeros((1 + 3 * LENGTH) * SAMPLES, np.float32)
    samples[frame * SAMPLES : (frame + 1) * SAMPLES] = 0.5
    found = [segment.fault for segment in read_segments("video.mp4", samples, config, fps=FPS, frame=segments.covering_frames)]
    assert found == ["silent", "no face", "silent"]  # the pictures are grey, so no face is found where there is sound


LEVEL = np.convolve(np.random.default_rng(0).standard_normal(104), np.ones(5) / 5, "valid")  # loudness of speech minus its mean
CHEWING = np.where(np.arange(100) % 2, -0.2, 0.2)


@pytest.mark.parametrize(
    ("mouth", "fault"),
    [
        (0.2 * LEVEL, ""),
        (0.2 * np.roll(LEVEL, 3), ""),
        (0.2 * np.roll(LEVEL, 12), "sound and mouth are apart in time"),
        (0.2 * np.roll(LEVEL, -12), "sound and mouth are apart in time"),
        (CHEWING, "the mouth does not follow the sound"),
        (0.001 * LEVEL, "the mouth does not move"),
    ],
)
def test_segments_with_unrelated_mouth_and_sound_are_left_out_and_earlier_faults_stay(config, mouth, fault):
    halves = [Segment(1 + 50 * n, 50, mouth=mouth[50 * n : 50 * (n + 1)], level=LEVEL[50 * n : 50 * (n + 1)]) for n in range(2)]
    first, dark, second = checked_sync([halves[0], Segment(51, 50, "no face"), halves[1]], config, FPS)
    assert (first.fault, dark.fault, second.fault) == (fault, "no face", fault)
    assert dark.sync is None and first.sync == second.sync
    assert (first.sync > 0.9) is (mouth is not CHEWING)


@pytest.mark.parametrize("late", [-12, 0, 3, 12])
def test_the_lag_is_that_of_the_mouth_behind_the_sound_in_seconds(config, late):
    (found,) = checked_sync([Segment(1, 100, mouth=0.2 * np.roll(LEVEL, late), level=LEVEL)], config, FPS)
    assert found.lag_s == pytest.approx(late / FPS, abs=0.02)


@pytest.mark.parametrize(
    ("box", "fits"),
    [
        ((60, 10, 40, 40), True),
        ((45, 10, 40, 40), False),
        ((75, 10, 40, 40), False),
        ((50, 0, 60, 60), True),
    ],
)
@pytest.mark.parametrize("upright", [True, False])
def test_a_face_fits_when_the_middle_of_the_picture_holds_all_of_it(config, box, fits, upright):
    """Of 160x60 pixels the middle 60 columns are kept at 64x64, or of 60x160 the middle rows."""
    x, y, width, height = box
    held, face = [np.zeros((60, 160, 3), np.uint8)] * 2, FaceBox(x, y, width, height)
    if upright:
        held, face = [np.zeros((160, 60, 3), np.uint8)] * 2, FaceBox(y, x, height, width)
    sized = replace(config, data=replace(config.data, size="64x64"))
    found = segments.covering_frames(held, Portrait(held[0], face, Mouth(1, 1, 1)), sized)
    assert (found is not None) is fits
    assert found is None or found.shape == (2, 64, 64, 3)


@pytest.fixture
def one_video(config, monkeypatch):
    """A video of two segments whose pictures and features encode the frame number."""
    samples = np.zeros((1 + 2 * LENGTH) * SAMPLES - 2 * SAMPLES, np.float32)  # the sound ends two frames early
    monkeypatch.setattr(own_videos, "load_soundtrack", lambda path: samples)
    made = [
        Segment(first, LENGTH, pixels=torch.stack([torch.full((8, 8, 3), first - 1 + n, dtype=torch.uint8) for n in range(LENGTH + 1)]),
             mouth=np.where(np.arange(LENGTH) == 4, -1.0, 0.0)) for first in (1, 1 + LENGTH)
    ]  # fmt: skip
    monkeypatch.setattr(own_videos, "read_segments", lambda path, samples, config, **_: iter(made))
    monkeypatch.setattr(own_videos, "checked_sync", lambda group, config, fps: group)
    return config.data.source


def zeros(segment: Segment) -> dict[str, torch.Tensor]:
    return {"latents": torch.zeros(1, 3)}


def columns(samples: np.ndarray, frames: int) -> torch.Tensor:
    """Features [1,1,F] equal to the number of their frame."""
    return torch.arange(float(frames)).view(1, 1, -1)


def test_the_features_of_a_clip_are_those_of_its_frames_and_nothing_after_the_sound(config, one_video):
    first, second = (clip["audio"][0, 0].tolist() for _, clip in clips_of("video.mp4", config, Encoders(columns, None, encode=zeros)))
    assert first == list(range(1, 1 + LENGTH))
    assert second == [*range(1 + LENGTH, 1 + 2 * LENGTH - 1), 0]


class Averages(torch.nn.Module):
    """An autoencoder whose latents are the means of their frames."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def encode(self, frames: torch.Tensor) -> tuple[torch.Tensor, None]:
        grey = (frames.mean((1, 3, 4)) + 1) * 127.5
        return torch.cat((grey[:, :1], grey[:, 1:].unflatten(1, (-1, 4)).mean(2)), dim=1).view(1, 1, -1, 1, 1), None


def test_whole_pictures_are_encoded_from_the_frame_before_and_the_portrait_is_the_one_at_rest(config, one_video):
    for segment, clip in clips_of("video.mp4", config, Encoders(columns, None, encode=partial(wan._encode, Averages()))):
        latents = [segment.first + 4 * n + 1.5 for n in range(LENGTH // 4)]
        assert clip["latents"].flatten().tolist() == pytest.approx(latents, abs=0.02)
        assert clip["ref"].item() == pytest.approx(segment.first + 4, abs=0.02)  # frame 4 of the segment


def test_a_video_that_turns_out_to_be_damaged_keeps_no_clip_of_what_came_before(config, one_video, monkeypatch):
    def broken(path, config, encoders):
        yield Segment(1, LENGTH), {"latents": torch.zeros(1, 3)}
        raise ValueError("video=video.mp4 cannot be decoded; give an undamaged video")

    monkeypatch.setattr(own_videos, "clips_of", broken)
    path = own_videos.Path(config.data.source) / "video.mp4"
    own_videos._write_video(config, lambda config: Encoders(None, None), (path, "video.safetensors"))
    found = read_metadata(own_videos.Path(config.folder) / "video.safetensors")
    assert found["clips"] == []
    assert [(line["video"], line["kept"], line["reason"]) for line in found["report"]] == [("video.mp4", False, "damaged")]


def test_the_shard_of_a_video_changes_with_everything_its_clips_depend_on(config):
    path = own_videos.Path(config.data.source) / "video.mp4"
    path.write_bytes(b"video")
    os.utime(path, ns=(1, 1))
    names = [own_videos._shard_name(path, config), own_videos._shard_name(path, replace(config, seed=7, folder="elsewhere"))]
    assert names[0] == names[1]
    names = names[:1] + [
        own_videos._shard_name(path, replace(config, **change))
        for change in ({"latent_frames": 6}, {"autoencoder": "other"}, {"model": ModelConfig(resolution=96)},
                       {"data": replace(config.data, least_sync=0.3)})
    ]  # fmt: skip
    path.with_suffix(".txt").write_text("a person speaks")
    names.append(own_videos._shard_name(path, config))
    path.with_suffix(".txt").write_text("a person sings!")
    names.append(own_videos._shard_name(path, config))
    os.utime(path, ns=(2, 2))
    names.append(own_videos._shard_name(path, config))
    path.write_bytes(b"longer video")
    os.utime(path, ns=(2, 2))
    names.append(own_videos._shard_name(path, config))
    assert len(set(names)) == len(names)
