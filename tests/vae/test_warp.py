"""Rendering of motion over a photograph."""

import numpy as np
import pytest
import torch
from einops import rearrange
from torch.testing import assert_close

from sonic.data.pixels import to_signed
from sonic.evaluation.metrics import mouth_opening
from sonic.synthetic.puppet import MouthShape, move
from sonic.types import Crop, MotionLayers, Portrait
from sonic.vae.warp import Canvas, _smooth_flow, fade, move_further, scale_mouth, settle


def layers(flow=(0.0, 0.0), opacity=0.0, frames=2, size=32):
    field = torch.tensor(flow).reshape(1, 1, 2, 1, 1).expand(1, frames, 2, size, size)
    return MotionLayers(field, torch.full((1, frames, 1, size, size), opacity), torch.full((1, frames, 3, size, size), 0.25))


def photograph(height=60, width=80):
    return torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_without_motion_the_photograph_is_unchanged():
    photo = photograph()
    frames = Canvas(Portrait(photo.numpy()), Crop(40.0, 30.0, 40.0, 0.1, 64)).render(layers())
    assert frames.dtype == torch.uint8 and (frames == photo).all()


def test_nothing_outside_the_crop_changes():
    photo = photograph()
    frames = Canvas(Portrait(photo.numpy()), Crop(40.0, 30.0, 30.0, 0.0, 64)).render(layers(flow=(0.1, 0.05), opacity=0.5))
    outside = torch.ones(60, 80, dtype=torch.bool)
    outside[15:45, 25:55] = False
    assert (frames[:, outside] == photo[outside]).all()
    assert (frames != photo).any()


def test_a_shift_in_the_crop_is_a_shift_in_the_photograph():
    photo = photograph(120, 120)
    moved = Canvas(Portrait(photo.numpy()), Crop(60.0, 60.0, 100.0, 0.0, 64)).render(layers(flow=(0.05, -0.02)))[0]
    middle = slice(50, 70)
    assert_close(moved[middle, middle], photo[48:68, 55:75])  # source = output + (5, -2) px


def test_the_shift_rotates_with_the_crop():
    photo = photograph(120, 120)
    quarter = Crop(60.0, 60.0, 100.0, torch.pi / 2, 64)  # the crop's x axis points down in the photograph
    moved = Canvas(Portrait(photo.numpy()), quarter).render(layers(flow=(0.05, 0.0)))[0]
    difference = (moved[50:70, 50:70].int() - photo[55:75, 50:70].int()).abs()
    assert difference.max() <= 1


def test_a_crop_that_leaves_the_photograph_is_rendered():
    frames = Canvas(Portrait(photograph().numpy()), Crop(5.0, 5.0, 60.0, 0.3, 64)).render(layers(flow=(0.05, 0.0), opacity=0.4))
    assert frames.shape == (2, 60, 80, 3)


def test_motion_fades_to_nothing_at_the_border():
    window = fade(32, 32, torch.zeros(1))
    assert window[0].max() < 0.1 and window[16, 16] == 1
    assert settle(layers(flow=(0.1, 0.0))).flow[..., 0, :].abs().max() < 0.01


def test_what_the_photograph_shows_between_the_lips_covers_the_painted_inside():
    photo = photograph()
    own = np.zeros((*photo.shape[:2], 4), np.uint8)
    own[..., 0], own[:, :40, 3] = 200, 255  # red, in the left half
    frames = Canvas(Portrait(photo.numpy(), inside=own), Crop(40, 30, 40, 0.0, 32)).render(layers(opacity=1.0))
    assert frames[0, 30, 35].tolist() == [200, 0, 0]
    assert (
        frames[0, 30, 45].tolist()
        == Canvas(Portrait(photo.numpy()), Crop(40, 30, 40, 0.0, 32)).render(layers(opacity=1.0))[0, 30, 45].tolist()
    )


@pytest.fixture
def speaking():
    """A closed mouth, and its motion while it opens."""
    inside = {"teeth": (0.9,) * 3, "throat": (0.2,) * 3, "tongue": (0.6,) * 3, "teeth_height": (0.2,)}
    mouth = MouthShape(x=48.0, y=52.8, unit=12.0, inside=inside)
    visemes = torch.zeros(12, 5)
    visemes[:, 0] = torch.linspace(0, 0.8, 12)
    return mouth, MotionLayers(*(track.unsqueeze(0) for track in move(mouth, visemes, resolution=96)))


@pytest.mark.parametrize("scale", [0.5, 0.7, 1.3, 2.0])
def test_a_mouth_moves_as_many_times_as_far_as_asked(speaking, scale):
    mouth, layers = speaking
    photo = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8))
    rest = to_signed(rearrange(photo, "h w c -> c h w"))

    def openings(scale: float) -> np.ndarray:
        frames = Canvas(Portrait(photo.numpy()), Crop(48.0, 48.0, 96.0, 0.0, 96), dynamic_scale=scale).render(layers)
        return mouth_opening(to_signed(rearrange(frames, "f h w c -> f c h w")), rest, mouth)

    assert openings(scale)[-1] / openings(1.0)[-1] == pytest.approx(scale, rel=0.1)


def test_a_mouth_that_moves_twice_as_far_is_nowhere_torn(speaking):
    mouth, layers = speaking
    points = move_further(_smooth_flow(layers)[0], 2.0)
    assert (points[:, 1:, :, 1] > points[:, :-1, :, 1]).all() and (points[:, :, 1:, 0] > points[:, :, :-1, 0]).all()


def test_what_is_still_stays_still_at_any_scale(speaking):
    still = MotionLayers(*(track[:, :1] for track in speaking[1]))
    for found, track in zip(scale_mouth(still, 2.0), still, strict=True):
        assert_close(found, track, atol=1e-5, rtol=0)
