"""The preview's motion autoencoder."""

import pytest
import torch
from torch.testing import assert_close

from sonic.types import MotionLayers
from sonic.vae.motion_vae import WarpAutoencoder


@pytest.fixture(scope="module")
def autoencoder():
    torch.manual_seed(0)
    model = WarpAutoencoder().eval().requires_grad_(False)
    for parameter in model.parameters():  # the zero-initialised ones too
        parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture
def portrait():
    return torch.rand(1, 3, 48, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1


def some_motion(frames, size=24):
    rng = torch.Generator().manual_seed(2)
    flow = 0.02 * torch.randn(1, frames, 2, size, size, generator=rng)
    return MotionLayers(flow, torch.rand(1, frames, 1, size, size, generator=rng), torch.rand(1, frames, 3, size, size, generator=rng))


def test_latents_have_the_geometry_of_the_wan_vae(autoencoder):
    assert autoencoder.encode(some_motion(12)).shape == (1, 16, 3, 6, 6)


def test_no_motion_is_the_zero_latent_and_back(autoencoder, portrait):
    still = MotionLayers(torch.zeros(1, 8, 2, 24, 24), torch.zeros(1, 8, 1, 24, 24), torch.rand(1, 8, 3, 24, 24))
    latents = autoencoder.encode(still)
    assert latents.abs().max() < 1e-5
    layers, _ = autoencoder.decode(torch.zeros_like(latents), autoencoder.reference(portrait))
    assert (layers.flow == 0).all()
    assert (layers.opacity == 0).all()


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1, 1), (2, 3, 1), (5, 1), (1, 4, 1)])
def test_streaming_decode_equals_one_shot_whatever_the_chunks(autoencoder, portrait, sizes):
    latents = torch.randn(1, 16, 6, 6, 6, generator=torch.Generator().manual_seed(3))
    reference = autoencoder.reference(portrait)
    whole, _ = autoencoder.decode(latents, reference)
    cache, parts = None, []
    for chunk in latents.split(sizes, dim=2):
        layers, cache = autoencoder.decode(chunk, reference, cache)
        parts.append(layers)
    for name in ("flow", "opacity", "interior"):
        streamed = torch.cat([getattr(part, name) for part in parts], 1)
        assert_close(streamed, getattr(whole, name), atol=1e-6, rtol=0)


def test_a_latent_affects_its_own_frames_and_the_next_latents_only(autoencoder, portrait):
    reference = autoencoder.reference(portrait)
    latents = torch.zeros(1, 16, 4, 6, 6)
    changed = latents.clone()
    changed[:, :, 1] = 1.0
    before, after = (autoencoder.decode(some, reference)[0].flow for some in (latents, changed))
    moved = (before - after).abs().amax((0, 2, 3, 4)) > 1e-6
    assert moved.nonzero().flatten().tolist() == list(range(4, 12))


def test_the_decoder_depends_on_the_portrait(autoencoder, portrait):
    latents = torch.randn(1, 16, 1, 6, 6, generator=torch.Generator().manual_seed(3))
    one, other = (autoencoder.decode(latents, autoencoder.reference(picture))[0].flow for picture in (portrait, -portrait))
    assert (one - other).abs().max() > 1e-5


def test_frames_that_do_not_fill_a_latent_frame_are_refused(autoencoder):
    with pytest.raises(ValueError, match="multiple"):
        autoencoder.encode(some_motion(6))


def test_a_portrait_of_odd_size_is_refused(autoencoder):
    with pytest.raises(ValueError, match="multiples of 8"):
        autoencoder.reference(torch.zeros(1, 3, 50, 48))
