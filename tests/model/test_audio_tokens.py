"""The audio path: it is causal, the constant past can be skipped, and each actor affects only its own patches."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from sonic.model.audio_tokens import AudioEncoder, AudioInjector, AudioTokens


@pytest.fixture
def encoder(rng) -> AudioEncoder:
    return AudioEncoder(6, 16, num_layers=3, num_tokens=2)


def test_skipping_the_constant_past_changes_nothing(encoder):
    features = torch.randn(2, 3, 6, 12)
    past = features[..., :1].expand(-1, -1, -1, 73)
    tokens, summary = encoder(torch.cat((past, features), dim=-1))
    short_tokens, short_summary = encoder.clip(features, (73, 19))
    assert short_tokens.shape == (2, 3, 3, 16)
    assert_close(short_tokens, tokens[:, 19:], atol=1e-5, rtol=1e-5)
    assert_close(short_summary, summary[:, 19:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("frame", [1, 4, 7, 11])
def test_a_latent_frame_uses_nothing_after_its_own_four_frames(encoder, frame):
    features = torch.randn(1, 3, 6, 12)
    louder = features.clone()
    louder[..., frame] += 1
    change = (encoder.clip(louder, (73, 19))[0] - encoder.clip(features, (73, 19))[0]).abs().amax(dim=(0, 2, 3))
    assert (change[: frame // 4] == 0).all()
    assert change[frame // 4] > 1e-3


def test_audio_of_one_latent_frame_moves_only_that_frame(rng):
    injector = AudioInjector(16, num_heads=2, eps=1e-6)
    grid, tokens, summary = torch.randn(1, 3, 5, 16), torch.randn(1, 3, 2, 16), torch.randn(1, 3, 16)
    other = tokens.clone()
    other[:, 1] += 1
    change = injector(grid, AudioTokens(other, summary)) - injector(grid, AudioTokens(tokens, summary))
    assert (change[:, [0, 2]] == 0).all()
    assert change[:, 1].abs().max() > 1e-3


def test_each_actor_moves_only_the_patches_of_its_mask(rng):
    injector = AudioInjector(16, num_heads=2, eps=1e-6)
    grid, tokens, summary = torch.randn(1, 3, 4, 16), torch.randn(2, 3, 2, 16), torch.randn(2, 3, 16)
    masks = torch.zeros(2, 3, 4, 1)
    masks[0, :, :2], masks[1, :, 2:] = 1, 1
    both = injector(grid, AudioTokens(tokens, summary, masks))
    for actor, patches in enumerate((slice(0, 2), slice(2, 4))):
        alone = injector(grid, AudioTokens(tokens[actor : actor + 1], summary[actor : actor + 1]))
        assert_close(both[:, :, patches], alone[:, :, patches], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_a_weight_scales_what_the_audio_adds(rng, scale):
    injector = AudioInjector(16, num_heads=2, eps=1e-6)
    grid, tokens, summary = torch.randn(1, 3, 4, 16), torch.randn(1, 3, 2, 16), torch.randn(1, 3, 16)
    plain, scaled = (injector(grid, AudioTokens(tokens, summary, masks)) for masks in (None, torch.full((1, 1, 4, 1), scale)))
    assert_close(scaled, scale * plain)
