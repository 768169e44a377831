"""The Wan VAE in streaming use."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from sonic.vae.wan_vae import WanAutoencoder


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return WanAutoencoder({"base_dim": 4}).requires_grad_(False)


@pytest.mark.parametrize("chunks", [[1, 4], [2, 2, 1], [1, 1, 1, 1, 1]])
def test_chunks_of_latents_give_the_same_frames(vae, chunks):
    latents = torch.randn(1, 16, 5, 2, 3)
    whole, _ = vae.decode(latents)
    cache, parts = None, []
    for part in latents.split(chunks, dim=2):
        frames, cache = vae.decode(part, cache)
        parts.append(frames)
    assert whole.shape == (1, 3, 17, 16, 24)
    assert_close(torch.cat(parts, dim=2), whole, atol=1e-6, rtol=0)


def test_a_cache_can_be_used_twice(vae):
    latents = torch.randn(1, 16, 3, 2, 2)
    _, cache = vae.decode(latents[:, :, :2])
    first, second = (vae.decode(latents[:, :, 2:], cache)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("chunks", [[1, 8], [5, 4], [1, 4, 4]])
def test_chunks_of_frames_give_the_same_latents(vae, chunks):
    video = torch.rand(1, 3, 9, 16, 16) * 2 - 1
    whole, _ = vae.encode(video)
    cache, parts = None, []
    for part in video.split(chunks, dim=2):
        latents, cache = vae.encode(part, cache)
        parts.append(latents)
    assert_close(torch.cat(parts, dim=2), whole, atol=1e-5, rtol=0)


def test_weights_in_half_precision_accept_float32_pictures():
    half = WanAutoencoder({"base_dim": 4}).to(torch.bfloat16).requires_grad_(False)
    latents, _ = half.encode(torch.rand(1, 3, 5, 16, 16))
    frames, _ = half.decode(latents)
    assert latents.dtype == frames.dtype == torch.bfloat16


def test_frames_that_would_be_lost_are_refused(vae):
    with pytest.raises(ValueError, match="12 frames"):
        vae.encode(torch.zeros(1, 3, 12, 16, 16))
