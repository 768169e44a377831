"""Parted lips meet before the preview speaks, whatever the size and rotation of the mouth, and what they showed is kept."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from skimage import data

from sonic.data.faces import FaceFinder, portrait_of
from sonic.data.lips import PARTED, close_mouth
from sonic.types import FaceBox, Mouth, Portrait

SKIN, LIP, TEETH = (200, 160, 140), (170, 60, 60), (250, 250, 245)


def drawn(*, gap: float = 0.4, unit: float = 30.0, angle: float = 0.0, side: int = 400) -> Portrait:
    """Two lips with teeth between them, in skin."""
    mouth = Mouth(side / 2, side / 2, unit, angle)
    across = np.linspace(-0.9, 0.9, 11)
    arch = 1 - (across / 0.9) ** 2
    edges = (-0.4 * gap * arch, 0.6 * gap * arch, -0.4 * gap * arch - 0.3 * arch, 0.6 * gap * arch + 0.4 * arch)
    points = np.stack([np.stack([across, edge], -1) for edge in edges])
    cos, sin = math.cos(angle), math.sin(angle)
    lips = points @ np.array([[cos, sin], [-sin, cos]]) * unit + side / 2
    ys, xs = np.mgrid[:side, :side] + 0.5 - side / 2
    x, y = (xs * cos + ys * sin) / unit, (ys * cos - xs * sin) / unit
    upper, lower, top, bottom = (np.interp(x, across, edge) for edge in edges)
    pixels = np.full((side, side, 3), SKIN, np.uint8)
    pixels[(y > top) & (y < bottom) & (np.abs(x) < 0.9)] = LIP
    pixels[(y > upper) & (y < lower) & (np.abs(x) < 0.9)] = TEETH
    face = FaceBox(side / 2 - 2.5 * unit, side / 2 - 3.0 * unit, 5 * unit, 5 * unit)  # ends at the chin, 2 units below the mouth
    return Portrait(pixels, face, mouth, lips)


def teeth(pixels: np.ndarray) -> int:
    return int((pixels.min(-1) > 210).sum())


@pytest.mark.parametrize("gap", [0.15, 0.4, 1.0])
@pytest.mark.parametrize("angle", [0.0, 0.4, -math.pi / 2, math.pi])
def test_no_tooth_is_seen_in_a_closed_mouth(gap, angle):
    portrait = drawn(gap=gap, angle=angle)
    assert teeth(portrait.pixels) > 100
    assert teeth(close_mouth(portrait).pixels) <= 2  # at the corners


@pytest.mark.parametrize("unit", [8.0, 30.0])
def test_what_is_far_from_the_mouth_does_not_change(unit):
    portrait = drawn(unit=unit)
    changed = (close_mouth(portrait).pixels != portrait.pixels).any(-1)
    ys, xs = np.nonzero(changed)
    assert np.abs(xs + 0.5 - 200).max() < 3 * unit and (ys + 0.5 - 200).min() > -1.5 * unit
    assert not changed[0].any() and not changed[-1].any()


def test_both_lips_are_still_there_and_as_high_as_before():
    portrait = drawn(gap=0.4)
    column = close_mouth(portrait).pixels[:, 200].astype(int)
    lip = np.nonzero(np.abs(column - LIP).sum(-1) < 130)[0]  # the line where they meet is darker
    assert len(lip) == pytest.approx((0.3 + 0.4) * 30, abs=8) and (np.diff(lip) == 1).all()


def test_the_chin_follows_only_a_mouth_that_is_wide_open():
    def chin_moves(gap: float) -> bool:
        portrait = drawn(gap=gap)
        portrait.pixels[200 + 58] = 0  # a line across the chin
        return bool((close_mouth(portrait).pixels[200 + 58, 200] != 0).any())

    assert chin_moves(1.0) and not chin_moves(0.2)


def test_the_open_mouth_is_kept_where_the_teeth_are_with_a_shade_below_them():
    portrait = drawn(gap=0.4)
    inside = close_mouth(portrait).inside
    column = inside[:, 200].astype(int)
    assert (column[197:203] == [*TEETH, 255]).all()  # the upper edge of the gap is at 195.2, its lower one at 207.2
    assert not inside[:195, :, 3].any() and not inside[215:, :, 3].any()
    assert (np.diff(column[208:213, 3]) < 0).all()


@pytest.mark.parametrize("angle", [0.0, 0.4, math.pi])
def test_a_strip_of_the_lower_lip_is_not_kept_with_the_teeth(angle):
    portrait = drawn(gap=0.7, angle=angle)
    cos, sin = math.cos(angle), math.sin(angle)
    ys, xs = np.mgrid[:400, :400] + 0.5 - 200
    x, y = (xs * cos + ys * sin) / 30, (ys * cos - xs * sin) / 30
    lower = 0.6 * 0.7 * (1 - (x / 0.9) ** 2)
    middle = np.abs(x) < 0.7
    portrait.pixels[middle & (y > lower - 0.27) & (y < lower - 0.2)] = 20  # the shade below the teeth
    strip = (np.abs(x) < 0.4) & (y > lower - 0.15) & (y < lower - 0.02)
    portrait.pixels[middle & (y > lower - 0.2) & (y < lower)] = LIP
    inside = close_mouth(portrait).inside
    assert inside[strip, 3].min() > 100 and inside[strip, 0].max() < 60
    above = (np.abs(x) < 0.4) & (y > -0.1) & (y < lower - 0.3)
    assert np.median(inside[above, :3], axis=0) == pytest.approx(TEETH)


def test_nothing_is_kept_of_a_mouth_that_is_hardly_open():
    assert not close_mouth(drawn(gap=0.12)).inside[..., 3].any()


def test_a_mouth_of_a_few_pixels_stays_as_it_is():
    portrait = drawn(unit=3.0)  # whose gap is 1.2 px high
    assert close_mouth(portrait) is portrait
    assert close_mouth(drawn(unit=5.0)).inside is not None


def test_a_closed_mouth_and_one_without_outlines_stay_as_they_are():
    closed, unknown = drawn(gap=0.9 * PARTED), replace(drawn(), lips=None)
    assert close_mouth(closed) is closed and close_mouth(unknown) is unknown


def test_a_mouth_that_is_cut_off_above_its_gap_stays_as_it_is():
    large = drawn()
    cut = replace(large, pixels=np.ascontiguousarray(large.pixels[:190]))  # the gap begins at 195
    assert close_mouth(cut) is cut


def test_a_smile_is_closed_and_given_coordinates_close_the_same_one():
    astronaut = np.ascontiguousarray(data.astronaut()[:260, 90:350])
    found = portrait_of(astronaut)
    closed, finder = close_mouth(found).pixels, FaceFinder()
    face, box, mouth = finder.face_in(astronaut, found.face), found.face, found.mouth
    assert finder.follow(closed, face.landmarks).opening < 0.3 * face.landmarks.opening
    given = portrait_of(astronaut, (box.x, box.y, box.width, box.height), (mouth.x, mouth.y, mouth.half_width, mouth.angle))
    assert (close_mouth(given).pixels == closed).all()


def test_a_mouth_that_is_given_elsewhere_has_no_outlines():
    astronaut = np.ascontiguousarray(data.astronaut()[:260, 90:350])
    found = portrait_of(astronaut)
    box = found.face
    elsewhere = portrait_of(astronaut, (box.x, box.y, box.width, box.height), (found.mouth.x, found.mouth.y - 40, found.mouth.half_width))
    assert elsewhere.lips is None
