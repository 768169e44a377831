"""Motion measured in the frames of an MP4: decoding gives the frames again, and the head pose is that of the video."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch
from einops import rearrange
from video_files import read_frames, warp_crop, write

from sonic.checkpoint.bundled import weight_files
from sonic.checkpoint.weights import load_weights
from sonic.config import ModelConfig
from sonic.data.motion import encode_motion, estimate_motion, head_pose
from sonic.evaluation import metrics
from sonic.synthetic import draw_face
from sonic.synthetic.drawn_people import random_visemes
from sonic.vae.motion_vae import WarpAutoencoder

SIDE, FRAMES = 192, 8


@pytest.fixture(scope="module")
def autoencoder():
    model = WarpAutoencoder()
    load_weights(model, weight_files(ModelConfig()).autoencoder)
    return model.eval().requires_grad_(False)


def written(folder, seed, *, sway=0.0):
    """Write a drawn person to an MP4: its decoded frames and the picture at rest, in [-1,1], and the pose [F,4]."""
    rng = np.random.default_rng(seed)
    person = draw_face.draw_identity(rng, SIDE, split="test", photographs=0, jitter=0.5)
    visemes = random_visemes(rng, FRAMES + 1)
    visemes[0] = 0
    pose = draw_face.head_motion(rng, FRAMES + 1, sway) if sway else torch.zeros(FRAMES + 1, 4)
    pose = pose - pose[:1]
    pose[:, 3] = 0
    frames, _ = draw_face.animate(person, visemes, pose if sway else None)
    pixels = rearrange(((frames + 1) * 127.5).round().byte(), "f c h w -> f h w c").numpy()
    shown = np.stack(list(islice(read_frames(write(folder / f"{seed}.mp4", pixels, None)), FRAMES + 1)))
    shown = rearrange(torch.from_numpy(shown), "f h w c -> f c h w").float() / 127.5 - 1
    return shown[1:], shown[0], pose[1:]


@pytest.mark.parametrize(("seed", "sway"), [(1, 0.0), (2, 0.0), (3, 1.0)])
def test_encoded_motion_decodes_to_the_frames(seed, sway, autoencoder, tmp_path):
    frames, rest, _ = written(tmp_path, seed, sway=sway)
    found = encode_motion(autoencoder, frames, rest)
    layers, _ = autoencoder.decode(found["latents"].unsqueeze(0), autoencoder.reference(rest.unsqueeze(0)))
    decoded = rearrange(warp_crop(rest.unsqueeze(0), layers)[0], "c f h w -> f c h w")
    still = metrics.psnr(rest.expand_as(frames), frames)
    assert metrics.psnr(decoded, frames) > max(33, still + 3)
    assert found["latents"].shape == (16, FRAMES // 4, SIDE // 8, SIDE // 8) and found["ref"].shape == (16, 1, SIDE // 8, SIDE // 8)


def test_the_head_motion_is_measured(tmp_path):
    frames, rest, pose = written(tmp_path, 3, sway=1.5)
    found = head_pose(estimate_motion(frames, rest).flow)
    assert (found - pose).abs().amax(0)[0] < 0.01 and (found - pose)[:, 1:3].abs().max() < 0.006


def test_a_picture_that_does_not_move_has_no_motion(autoencoder, tmp_path):
    _, rest, _ = written(tmp_path, 1)
    noise = 0.01 * torch.randn(4, *rest.shape, generator=torch.Generator().manual_seed(0))
    found = encode_motion(autoencoder, rest + noise, rest)
    assert found["latents"].abs().max() < 0.02
