"""Guidance, windows and precision of the sampler of clips, with a network whose answer is known."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from sonic.config import UNetConfig
from sonic.inference import denoise_windows
from sonic.inference.denoise_windows import NOTHING, SILENT, SOUND, ClipConditions, WindowSampling, clip_noise, denoise_clip, row_weights
from sonic.model.svd_unet import SvdUNet
from sonic.sampling.karras import clean_from, euler_step, karras_sigmas, noisy_start
from sonic.sampling.windows import windows_of

TINY = UNetConfig([32, 32, 64], [2, 4, 8], cross_attention_dim=24, addition_time_embed_dim=16, audio_tokens=5, window_frames=5)
FRAMES = 7


class Recorded:
    """A network that predicts the mean of each row's picture latents and tokens, and keeps what it was given."""

    def __init__(self):
        self.calls = []

    def __call__(self, sample, timestep, conditions):
        self.calls.append((sample, timestep, conditions))
        tokens = torch.stack([conditions.audio_tokens[row].float().mean((1, 2)) for row in conditions.frames])
        return (sample[:, :, 4:].float() + tokens[..., None, None, None]).to(sample.dtype)


@pytest.fixture
def conditions(rng):
    draw = lambda *shape: torch.randn(*shape, generator=rng)  # noqa: E731
    return ClipConditions(draw(4, 8, 8), draw(FRAMES, 5, 24), draw(5, 24), 16 + draw(FRAMES, 2), draw(24))


def sampling(**changes) -> WindowSampling:
    return WindowSampling(**{"steps": 3, "windows": TINY, **changes})


@pytest.mark.parametrize("picture", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("sound", [0.0, 1.0, 2.0, 7.5])
def test_guidance_is_the_published_sum_without_the_rows_of_weight_zero(picture, sound):
    rows = dict(zip((NOTHING, SILENT, SOUND), torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), strict=True))
    weights = row_weights(picture, sound)
    expected = rows[NOTHING] + picture * (rows[SILENT] - rows[NOTHING]) + sound * (rows[SOUND] - rows[SILENT])
    assert_close(sum(weight * rows[row] for row, weight in weights.items()), expected)
    assert (NOTHING in weights, SILENT in weights, SOUND in weights) == (picture != 1, picture != sound, sound != 0)


def test_rows_of_weight_zero_are_not_computed(conditions):
    for scales, rows in (((2.0, 7.5), 3), ((2.0, 2.0), 2), ((1.0, 7.5), 2), ((1.0, 1.0), 1)):
        network = Recorded()
        ramp = {"sample_guide_scale": (scales[0],) * 2, "audio_guide_scale": (scales[1],) * 2}
        denoise_clip(network, conditions, torch.randn(FRAMES, 4, 8, 8), sampling=sampling(**ramp))
        assert {len(sample) for sample, _, _ in network.calls} == {rows}


def test_guidance_runs_evenly_over_the_steps_that_are_left():
    plan = sampling(steps=6, strength=0.5, sample_guide_scale=(1.0, 3.0), audio_guide_scale=(4.0, 8.0)).plan()
    assert [step.weights for step in plan] == [row_weights(1, 4), row_weights(2, 6), row_weights(3, 8)]
    assert [step.sigma for step in plan] == karras_sigmas(6)[3:6].tolist()


def test_a_step_of_one_window_is_the_formula(conditions):
    noise = torch.randn(5, 4, 8, 8)
    seen = []
    given = ClipConditions(
        conditions.image_latents, conditions.tokens[:5], conditions.silence, conditions.buckets[:5], conditions.image_embed
    )
    denoise_clip(Recorded(), given, noise, sampling=sampling(), on_step=lambda number, timestep, latents: seen.append(latents))
    now, following = karras_sigmas(3)[:2].tolist()
    x = noisy_start(given.image_latents, noise, now)
    silent = given.image_latents + given.silence.mean()
    v = (
        given.silence.mean()
        + 2 * (silent - given.silence.mean())
        + 7.5 * (given.tokens.mean((1, 2)) - given.silence.mean())[:, None, None, None]
    )
    assert_close(seen[0], euler_step(x, clean_from(x, v, now), sigma=now, following=following), atol=1e-3, rtol=1e-5)


def test_both_motion_buckets_are_scaled_and_the_frame_rate_is_not(conditions):
    network, scaled = Recorded(), Recorded()
    for found, scale in ((network, 1.0), (scaled, 1.3)):
        denoise_clip(found, conditions, torch.randn(FRAMES, 4, 8, 8), sampling=sampling(dynamic_scale=scale))
    ids, other = (torch.stack([given.added_ids for _, _, given in found.calls]) for found in (network, scaled))
    assert_close(other, ids * torch.tensor([1.0, 1.3, 1.3]))
    window = windows_of(FRAMES, 0, TINY)[1]
    assert_close(ids[1, 0], torch.cat([torch.tensor([12.5]), conditions.buckets[window].mean(0)]))


def test_latents_stay_in_float32_beside_a_network_in_bfloat16(conditions):
    half = ClipConditions(
        conditions.image_latents, conditions.tokens.bfloat16(), conditions.silence.bfloat16(), conditions.buckets, conditions.image_embed
    )
    network, seen = Recorded(), []
    noise = torch.randn(FRAMES, 4, 8, 8)
    denoise_clip(network, half, noise, sampling=sampling(), on_step=lambda number, timestep, latents: seen.append(latents))
    assert {sample.dtype for sample, _, _ in network.calls} == {torch.bfloat16}
    assert {latents.dtype for latents in seen} == {torch.float32}
    assert not torch.equal(seen[0], seen[0].bfloat16().float())


def test_every_frame_is_in_a_window_and_the_windows_move_by_the_shift():
    for frames in (1, 4, 5, 6, 7, 13):
        for step in (0, 1, 9):
            windows = windows_of(frames, step, TINY)
            assert {frame for window in windows for frame in window} == set(range(frames))
            assert windows[0][0] == -7 * step % frames and {len(window) for window in windows} == {5}


def test_windows_that_overlap_and_frames_that_repeat_are_averaged():
    windows = [[0, 1, 2, 0, 1], [2, 0, 1, 2, 0]]
    results = torch.arange(10.0).reshape(2, 5, 1, 1, 1)
    found = denoise_windows.mean_of_windows(windows, list(results), 3).flatten().tolist()
    assert found == [(0 + 3 + 6 + 9) / 4, (1 + 4 + 7) / 3, (2 + 5 + 8) / 3]


def test_a_clip_too_long_for_the_cache_gets_the_same_latents(conditions, monkeypatch):
    torch.manual_seed(0)
    unet = SvdUNet(TINY).eval()
    noise = torch.randn(FRAMES, 4, 8, 8)
    kept = denoise_clip(unet, conditions, noise, sampling=sampling())
    monkeypatch.setattr(denoise_windows, "CACHED_FRAMES", FRAMES - 1)
    assert_close(denoise_clip(unet, conditions, noise, sampling=sampling()), kept, atol=1e-4, rtol=1e-4)


def test_noise_is_drawn_in_the_published_order():
    torch.manual_seed(5)
    expected = torch.randn(1, 3, 16, 24), torch.randn(1, 6, 4, 2, 3)
    found = clip_noise(torch.Generator().manual_seed(5), 6, height=16, width=24)
    assert all(torch.equal(some, wanted[0]) for some, wanted in zip(found, expected, strict=True))
