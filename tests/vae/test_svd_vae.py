"""The decoder of Stable Video Diffusion in chunks."""

import pytest
import torch
from torch.testing import assert_close

from sonic.vae.svd_vae import SvdAutoencoder

TINY = {"block_out_channels": (32, 64), "down_block_types": ("DownEncoderBlock2D",) * 2, "layers_per_block": 1, "latent_channels": 4}
FRAMES = 13


@pytest.fixture(scope="module")
def autoencoder():
    torch.manual_seed(0)
    return SvdAutoencoder(TINY)


@pytest.fixture
def latents(rng):
    return torch.randn(FRAMES, 4, 4, 6, generator=rng)


def decoded(autoencoder, latents, chunk, overlap=0):
    return list(autoencoder.decode(latents, chunk=chunk, overlap=overlap))


def test_chunks_cover_the_clip_in_order_and_the_last_one_is_shorter(autoencoder, latents):
    for overlap in (0, 2, 20):
        chunks = decoded(autoencoder, latents, 5, overlap)
        assert [tuple(chunk.shape) for chunk in chunks] == [(length, 3, 8, 12) for length in (5, 5, 3)]


def test_a_chunk_without_overlap_is_decoded_as_if_it_were_alone(autoencoder, latents):
    for index, chunk in enumerate(decoded(autoencoder, latents, 5)):
        (alone,) = decoded(autoencoder, latents[5 * index : 5 * index + 5], FRAMES)
        assert torch.equal(chunk, alone)


def test_chunks_that_overlap_over_the_whole_clip_equal_one_decode(autoencoder, latents):
    (whole,) = decoded(autoencoder, latents, FRAMES)
    assert_close(torch.cat(decoded(autoencoder, latents, 5, FRAMES)), whole)


def test_each_two_frames_of_overlap_bring_the_frames_closer_to_one_decode(autoencoder, latents):
    (whole,) = decoded(autoencoder, latents, FRAMES)
    errors = [(torch.cat(decoded(autoencoder, latents, 4, overlap)) - whole).pow(2).mean().sqrt() for overlap in (0, 2, 4)]
    assert errors[1] < errors[0] / 2 and errors[2] < errors[0] / 4, errors


def test_bfloat16_decodes_to_nearly_the_same_frames(autoencoder, latents):
    (whole,) = decoded(autoencoder, latents, FRAMES)
    halved = SvdAutoencoder(TINY)
    halved.blocks.load_state_dict(autoencoder.blocks.state_dict())
    (found,) = decoded(halved.bfloat16(), latents, FRAMES)
    assert found.dtype is torch.bfloat16
    assert (found.float() - whole).pow(2).mean().sqrt() < 0.03 * whole.std()


def test_without_a_config_it_has_the_published_sizes():
    with torch.device("meta"):
        tensors = SvdAutoencoder().blocks.state_dict()
    assert len(tensors) == 374 and sum(tensor.numel() for tensor in tensors.values()) == 97_742_847
