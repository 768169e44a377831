"""RIFE: the frame between two frames, of any size, and its published weights."""

import pytest
import torch
from torch.testing import assert_close

from sonic.vae.rife import CHANNELS, Rife, warp

PUBLISHED_NUMBERS = 3_038_015  # of all weights in the published file


@pytest.fixture
def rife():
    torch.manual_seed(0)
    return Rife(16).eval()


def test_the_weights_are_as_many_as_the_published_file_holds():
    loaded = Rife(CHANNELS)
    numbers, of_a_stage = (sum(tensor.numel() for tensor in module.parameters()) for module in (loaded, loaded.block0))
    unused = of_a_stage + 3 * 9 * CHANNELS // 2  # which also sees the true frame
    assert numbers + unused == PUBLISHED_NUMBERS


@pytest.mark.parametrize("size", [(64, 64), (50, 70), (33, 1)], ids=str)
def test_swapping_the_frames_does_not_change_the_one_between_them(rife, rng, size):
    first, second = torch.rand(2, 1, 3, *size, generator=rng)
    found = rife.middle(first, second)
    assert found.shape == first.shape and found.min() >= 0 and found.max() <= 1
    assert_close(found, rife.middle(second, first), atol=1e-5, rtol=1e-5)
    assert (found - first).abs().max() > 0.1, "it is neither of them"


def test_pairs_of_a_batch_do_not_see_each_other(rife, rng):
    first, second = torch.rand(2, 3, 3, 32, 32, generator=rng)
    alone = torch.cat([rife.middle(*pair) for pair in zip(first.split(1), second.split(1), strict=True)])
    assert_close(rife.middle(first, second), alone, atol=1e-5, rtol=1e-5)


def test_flow_is_in_pixels_to_the_right_and_down(rng):
    picture = torch.rand(1, 3, 6, 9, generator=rng)
    moved = warp(picture, torch.tensor([2.0, 1.0]).reshape(1, 2, 1, 1).expand(1, 2, 6, 9))
    assert_close(moved[..., :5, :7], picture[..., 1:, 2:])
    assert_close(moved[..., 5, 8], picture[..., 5, 8], msg="outside the picture its border repeats")
