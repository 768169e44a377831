"""Quality metrics: each measures what it should, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sonic.evaluation import metrics
from sonic.synthetic import draw_face, puppet, voices


def spoken(seed, frames=100):
    rng = np.random.default_rng(seed)
    tracks = [voices.viseme_track(voices.say(rng, split="test", seconds=frames / 25), frames) for _ in range(2)]
    person = draw_face.draw_identity(rng, 192, split="test", photographs=0)
    return person, torch.from_numpy(tracks[0]), tracks[1]


def picture_at_rest(person):
    return torch.from_numpy(person.picture).permute(2, 0, 1).float() / 127.5 - 1


@pytest.mark.parametrize("seed", range(6))
def test_the_opening_is_read_from_true_frames(seed):
    person, visemes, _ = spoken(seed)
    frames, _ = draw_face.animate(person, visemes)
    read = metrics.mouth_opening(frames, picture_at_rest(person), person.mouth)
    assert metrics.correlation(read, puppet.lip_displacement(person.mouth, visemes).numpy()) >= 0.98


@pytest.mark.parametrize("seed", range(4))
def test_a_soft_and_tinted_mouth_is_measured_correctly(seed):
    person, visemes, _ = spoken(seed)
    frames, _ = draw_face.animate(person, visemes)
    changed = ((frames - picture_at_rest(person)).abs().mean(1, keepdim=True) > 0.15).float()
    soft = torch.nn.functional.avg_pool2d(frames, 3, 1, 1, count_include_pad=False)
    tinted = (soft + changed * torch.tensor([0.1, -0.05, -0.05]).view(3, 1, 1)).clamp(-1, 1)
    read = metrics.mouth_opening(tinted, picture_at_rest(person), person.mouth)
    assert metrics.correlation(read, puppet.lip_displacement(person.mouth, visemes).numpy()) >= 0.95


def test_a_still_mouth_has_opening_zero():
    person, _, _ = spoken(3)
    read = metrics.mouth_opening(picture_at_rest(person).expand(5, -1, -1, -1), picture_at_rest(person), person.mouth)
    assert np.abs(read).max() < 0.01


def test_the_mask_leaves_out_the_mouth_and_keeps_the_rest():
    mask = metrics.mouth_mask(puppet.MouthShape(96, 106, 24), 192, 192)
    assert mask[106, 96] == 0 and mask[130, 96] == 0
    assert mask[60, 96] == 1 and mask[106, 20] == 1
    assert 0.8 < mask.mean() < 0.97


@pytest.mark.parametrize("late", [-5, 0, 3])
def test_the_best_lag_finds_a_shift(late):
    rng = np.random.default_rng(0)
    track = np.convolve(rng.normal(size=300), np.hanning(7), "same")
    found = np.roll(track, late) + 0.1 * rng.normal(size=300)
    r, lag = metrics.best_lag(found[20:-20], track[20:-20])
    assert r > 0.95 and abs(lag - late) < 0.3


def test_a_lag_of_half_a_frame_is_measured():
    time = np.arange(200)
    r, lag = metrics.best_lag(np.sin(0.6 * (time - 0.5)) + np.sin(0.23 * (time - 0.5)), np.sin(0.6 * time) + np.sin(0.23 * time))
    assert r > 0.9 and abs(lag - 0.5) < 0.15


def test_a_still_track_correlates_with_nothing():
    assert metrics.correlation(np.zeros(10), np.arange(10.0)) == 0


def test_psnr_counts_masked_pixels_only():
    truth = torch.zeros(2, 3, 8, 8)
    found = truth.clone()
    found[..., :4] = 2.0
    mask = torch.zeros(8, 8)
    mask[:, 4:] = 1
    assert metrics.psnr(found, truth, mask) > 100
    assert metrics.psnr(found, truth) == pytest.approx(3.01, abs=0.01)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 3, 8, 8), (5, 3, 8, 8)])
@pytest.mark.parametrize("rows", [1, 4, 8])
def test_the_same_error_inside_a_mask_is_the_same_psnr_whatever_the_number_of_frames_and_pixels(shape, rows):
    mask = torch.zeros(8, 8)
    mask[:rows] = 1
    error = 0.2
    assert metrics.psnr(torch.full(shape, error) * mask, torch.zeros(shape), mask) == pytest.approx(10 * np.log10(4 / error**2), abs=1e-4)


def test_jumps_at_joins_raise_the_join_ratio():
    ramp = torch.linspace(0, 1, 36).reshape(36, 1, 1, 1).expand(-1, 3, 4, 4)
    assert metrics.join_ratio(ramp, 12) == pytest.approx(1.0, abs=1e-3)
    jumps = ramp + (torch.arange(36) // 12).reshape(36, 1, 1, 1) * 0.1
    assert metrics.join_ratio(jumps, 12) > 3


def test_flicker_is_zero_for_even_motion_and_one_for_black_and_white():
    ramp = torch.linspace(-1, 1, 9).reshape(9, 1, 1, 1).expand(-1, 3, 4, 4)
    assert metrics.flicker(ramp) == pytest.approx(0.0, abs=1e-6)
    blink = torch.tensor([1.0, -1.0]).repeat(4).reshape(8, 1, 1, 1).expand(-1, 3, 4, 4)
    assert metrics.flicker(blink) == pytest.approx(1.0)


def test_an_interval_holds_the_mean_and_every_clip():
    found = metrics.mean_and_interval([1.0, 2.0, 3.0])
    assert found["mean"] == 2 and found["clips"] == [1.0, 2.0, 3.0]
    assert found["ci95"] == pytest.approx(1.96 / 3**0.5) and metrics.in_words(found) == "2.000 ± 1.132"


def test_one_clip_has_no_interval():
    found = metrics.mean_and_interval([0.5])
    assert found == {"mean": 0.5, "ci95": None, "clips": [0.5]} and metrics.in_words(found) == "0.500"
