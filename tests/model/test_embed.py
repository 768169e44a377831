"""Positions and embeddings: rotations exact at any distance, and the published positions of the memory tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from sonic.config import AdapterConfig
from sonic.model.adapters import Adapters
from sonic.model.embed import FramePack, PatchEmbed, TextEmbed, TimeEmbed, grid_positions, motion_positions, ref_time_id, rotate, rotation

HEAD_DIM = 24  # 12 pairs: 4 of time, 4 of rows, 4 of columns


def turned_by_hand(heads: torch.Tensor, time: int, row: int, column: int) -> torch.Tensor:
    """Rotation of one token in Python's own floats."""
    side = HEAD_DIM // 6
    ids = [(time, HEAD_DIM // 2 - 2 * side), (row, side), (column, side)]
    angles = [position * 10_000.0 ** (-pair / pairs) for position, pairs in ids for pair in range(pairs)]
    found = []
    for (even, odd), angle in zip(heads.view(-1, 2).tolist(), angles, strict=True):
        found += [even * math.cos(angle) - odd * math.sin(angle), even * math.sin(angle) + odd * math.cos(angle)]
    return torch.tensor(found)


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("time", [0, -19, 30, 45_000, 3_000_000])
def test_rotations_are_exact_however_far_the_block_is(time, learns):
    """Block 1 000 000 starts at latent frame 3 000 000."""
    heads = torch.randn(1, 6, 1, HEAD_DIM)
    with torch.set_grad_enabled(learns):
        found = rotate(heads, rotation(grid_positions(torch.tensor([time]), 2, 3), HEAD_DIM))
    for token in range(6):
        assert_close(found[0, token, 0], turned_by_hand(heads[0, token, 0], time, token // 3, token % 3), atol=1e-6, rtol=1e-6)


def test_both_forms_of_a_rotation_are_equal_and_so_are_their_gradients(monkeypatch):
    """As a product of complex numbers, and in real numbers as the compiler is given it."""
    turns, upstream = rotation(grid_positions(torch.tensor([7]), 2, 3), HEAD_DIM), torch.randn(1, 6, 2, HEAD_DIM)
    found = []
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
        heads = torch.linspace(-1, 1, upstream.numel()).view_as(upstream).requires_grad_()
        turned = rotate(heads, turns)
        found.append((turned, *torch.autograd.grad((turned * upstream).sum(), heads)))
    for complex_form, real_form in zip(*found, strict=True):
        assert_close(real_form, complex_form, atol=1e-6, rtol=1e-6)


def test_a_rotation_in_half_precision_is_rounded_once():
    heads = torch.randn(2, 6, 3, HEAD_DIM).bfloat16()
    turn = rotation(grid_positions(torch.tensor([11]), 2, 3), HEAD_DIM)
    with torch.no_grad():
        assert_close(rotate(heads, turn), rotate(heads.float(), turn).bfloat16(), atol=0, rtol=0)


def test_a_rotation_keeps_lengths_and_only_differences_of_positions_matter():
    query, key = torch.randn(2, 1, 1, 1, HEAD_DIM)

    def score(first: int, second: int) -> torch.Tensor:
        rotations = [rotation(grid_positions(torch.tensor([time]), 1, 1), HEAD_DIM) for time in (first, second)]
        return (rotate(query, rotations[0]) * rotate(key, rotations[1])).sum()

    assert_close(score(5, 2), score(3_000_005, 3_000_002), atol=1e-5, rtol=1e-5)
    assert_close(rotate(query, rotation(grid_positions(torch.tensor([7]), 1, 1), HEAD_DIM)).norm(), query.norm())


def test_motion_tokens_sit_before_the_clip_at_the_published_positions():
    time, row, column = motion_positions([1, 2, 16], 8, 4)
    assert len(time) == 8 * 4 + 4 * 2 + 4 * 2 * 1
    assert time.unique().tolist() == [-19, -14, -9, -4, -3, -1]
    assert row[time == -3].unique().tolist() == [0, 2, 4, 7]
    assert column[time == -3].unique().tolist() == [0, 3]
    assert row[time == -19].unique().tolist() == [0, 7]


@pytest.mark.parametrize("height", range(4, 260, 4))
def test_motion_tokens_are_spread_as_numpy_spreads_the_published_ones(height):
    _, row, _ = motion_positions([1, 2, 16], height, 4)
    spread = [np.trunc(np.linspace(0, height - 1, height // scale)).tolist() for scale in (1, 2, 4)]
    assert [row[times].unique().tolist() for times in (slice(4 * height), slice(4 * height, 5 * height), slice(5 * height, None))] == spread


def test_the_reference_position_is_fixed_and_then_moves_ahead_of_the_block():
    assert [ref_time_id(start, distance=10) for start in (0, 20, 21, 50)] == [30, 30, 31, 60]
    assert ref_time_id(3_000_000, distance=16) - 3_000_000 == 16


def test_a_patch_embedding_is_the_convolution_it_stores():
    embed = PatchEmbed(4, 10, (1, 3, 3))
    latents = torch.randn(2, 4, 5, 6, 9)
    expected = torch.nn.Conv3d.forward(embed, latents)
    assert_close(embed(latents), expected.flatten(3).permute(0, 2, 3, 1), atol=1e-5, rtol=1e-5)


def test_latents_that_do_not_divide_into_patches_are_named():
    with pytest.raises(ValueError, match=r"\[5, 7, 9\].*\[1, 3, 3\]"):
        PatchEmbed(4, 10, (1, 3, 3))(torch.randn(1, 4, 5, 7, 9))


@pytest.mark.parametrize(("keep", "blanked"), [(2, 0), (1, 1), (0, 3)])
def test_blanking_the_newest_past_equals_zeros_there(keep, blanked):
    pack = FramePack(4, 10, (1, 1, 1), buckets=(1, 2, 16))
    motion = torch.randn(1, 4, 19, 4, 4)
    silent = motion.clone()
    silent[:, :, 19 - blanked :] = 0
    assert_close(pack(motion, keep), pack(silent))


def test_a_short_past_is_zeros_before_it_and_a_long_one_its_end():
    pack = FramePack(4, 10, (1, 1, 1), buckets=(1, 2, 16))
    motion = torch.randn(1, 4, 25, 4, 4)
    assert_close(pack(motion), pack(motion[:, :, -19:]))
    padded = torch.cat((torch.zeros(1, 4, 14, 4, 4), motion[:, :, -5:]), dim=2)
    assert_close(pack(motion[:, :, -5:]), pack(padded))


def test_a_prompt_is_padded_with_zero_rows_before_it_is_projected():
    embed, rows = TextEmbed(5, 4, 10), torch.randn(1, 2, 5)
    assert_close(embed(rows), embed(torch.cat((rows, torch.zeros(1, 2, 5)), dim=1)))


def test_a_prompt_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="5 rows; the model reads at most 4"):
        TextEmbed(5, 4, 10)(torch.randn(1, 5, 5))


def test_the_noise_level_is_embedded_in_float32_whatever_the_weights_are_stored_in(rng):
    narrow, wide, timestep = TimeEmbed(16, 24).bfloat16(), TimeEmbed(16, 24), torch.tensor([[0.0, 3.7, 999.5]])
    wide.load_state_dict(narrow.state_dict())  # the same rounded weights
    for found, expected in zip(narrow(timestep), wide(timestep), strict=True):
        assert found.dtype == torch.float32
        assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("learns", [True, False])
def test_under_autocast_the_noise_level_is_embedded_in_float32(learns, adapted, rng):
    embed, timestep = TimeEmbed(16, 24), torch.tensor([[0.0, 3.7, 999.5]])
    if adapted:
        Adapters(embed, ["student"], AdapterConfig(rank=2))
    with torch.set_grad_enabled(learns):
        expected = embed(timestep)
        with torch.autocast("cpu", torch.bfloat16):
            found = embed(timestep)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert_close(one, other, atol=0, rtol=0)
