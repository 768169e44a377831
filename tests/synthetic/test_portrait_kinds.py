"""Drawn portraits by kind, their closed twins, and turned heads."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from sonic.synthetic.draw_face import draw_identity
from sonic.synthetic.portrait_kinds import KINDS, YAW, draw_portrait, turned, turned_back
from sonic.synthetic.puppet import MouthShape

SIDE = 96
MOUTH = MouthShape(48, 52, 12)


def portrait(kind, seed=0):
    return draw_portrait(np.random.default_rng(seed), SIDE, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_the_closed_twin_differs_at_the_mouth_alone_and_an_open_one_at_the_jaw(kind):
    for seed in range(4):
        drawn = portrait(kind, seed)
        mouth = drawn.person.mouth
        rows, columns = np.nonzero((drawn.person.picture != drawn.closed.picture).any(-1))
        assert drawn.closed.mouth.gap == 0 and (len(rows) > 0) == (mouth.gap > 0)
        if kind == "open":
            assert drawn.closed.mouth.chin < mouth.chin and (rows - mouth.y).min() > -4 * mouth.unit
        else:
            assert len(rows) == 0 or np.hypot(rows - mouth.y, columns - mouth.x).max() < 1.6 * mouth.unit


def test_the_same_seed_draws_the_same_portrait():
    assert (portrait("profile", 3).picture == portrait("profile", 3).picture).all()
    assert (portrait("profile", 3).picture != portrait("profile", 4).picture).any()


@pytest.mark.parametrize(("kind", "low", "high"), [("closed", 0, 0), ("smile", 0.08, 0.35), ("open", 0.4, 1.1)])
def test_the_lips_are_as_far_apart_as_the_kind_says(kind, low, high):
    assert all(low <= portrait(kind, seed).person.mouth.gap <= high for seed in range(8))


@pytest.mark.parametrize("mark", ["beard", "moustache", "glasses"])
def test_everybody_of_a_kind_has_its_mark_and_it_shows(mark):
    for seed in range(3):
        asked = KINDS[mark](np.random.default_rng(seed))
        with_it, without = (
            draw_identity(np.random.default_rng(seed), SIDE, photographs=0, traits=replace(asked, **{mark: chance})).picture
            for chance in (getattr(asked, mark), 0)
        )
        assert (with_it != without).any()


def test_heads_in_profile_are_turned_and_others_are_not():
    turns = [portrait("profile", seed).yaw for seed in range(8)]
    assert all(YAW[0] <= abs(yaw) <= YAW[1] for yaw in turns) and min(turns) < 0 < max(turns)
    assert portrait("open").yaw == 0 and portrait("open").picture is not portrait("open").person


@pytest.mark.parametrize("yaw", [-25.0, 12.0, 25.0])
def test_a_head_is_turned_back_exactly(yaw):
    """Up to the blur of sampling twice."""
    rows, columns = torch.meshgrid(*2 * [torch.linspace(0, 6, SIDE)], indexing="ij")
    frames = torch.stack([columns.sin(), rows.cos(), (rows + columns).sin()])[None]
    assert_close(turned_back(turned(frames, MOUTH, yaw), MOUTH, yaw), frames, atol=0.02, rtol=0)


def test_the_nearer_half_of_a_turned_head_is_wider_and_the_border_stays():
    across = torch.arange(SIDE).float().expand(1, 3, SIDE, SIDE)
    found = turned(across, MOUTH, 25.0)[0, 0]  # where each pixel comes from
    at = lambda column: float((found[52] - column).abs().argmin())  # noqa: E731 - where a column of the front goes
    left, middle, right = at(48 - 24), at(48), at(48 + 24)
    assert middle > 48 and middle - left > 1.3 * (right - middle)
    assert_close(found[:, [0, -1]], across[0, 0][:, [0, -1]], atol=0.01, rtol=0)
    assert_close(found[-1], across[0, 0, -1], atol=0.01, rtol=0)
