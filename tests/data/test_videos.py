"""A folder of one's own videos: what can be used becomes clips, what cannot is told with its reason."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from footage import astronaut, delayed, speech, talking, write

from sonic.config import ModelConfig
from sonic.data.clips import ClipDataset
from sonic.data.precompute import precompute
from sonic.data.settings import FootageConfig, PrecomputeConfig
from sonic.data.videos import REPORT
from sonic.train.encoders import build_encoders

FRAMES = 2 * 48 + 1  # two clips of twelve latent frames, and the frame before them


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("espeakng_loader")
    place = tmp_path_factory.mktemp("videos")
    samples, visemes = speech(1, FRAMES)
    pixels = talking(visemes)
    (place / "inside").mkdir()
    good = write(place / "inside" / "good.mp4", pixels, samples)
    write(place / "late.mp4", pixels, delayed(samples, 0.5))
    write(place / "dubbed.mp4", np.repeat(astronaut()[None], FRAMES, 0), samples)
    write(place / "silent.mp4", pixels, np.zeros_like(samples))
    write(place / "mute.mp4", pixels, None)
    write(place / "short.mp4", pixels[:20], samples[:12800])
    write(place / "nobody.mp4", np.repeat(np.roll(pixels[:, ::-1], 60, 1)[:1, :160, :160], FRAMES, 0), samples)
    whole = good.read_bytes()
    (place / "broken.mp4").write_bytes(whole[: len(whole) // 2])
    (place / "notes.txt").write_text("not a video")
    return place


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
        ("silent.mp4", "silent"): 2,
        ("mute.mp4", "no sound"): 1,
        ("short.mp4", "shorter than a clip of 1.9 s"): 1,
        ("nobody.mp4", "no face"): 2,
        ("broken.mp4", "damaged"): 1,
    }
