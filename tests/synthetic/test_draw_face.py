"""Drawn people and their animation."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from sonic.synthetic import draw_face, puppet
from sonic.synthetic.drawn_people import DrawnFaces, motion_targets

REST, WIDE, CLOSED = [0.0] * 5, [1.0, 0, 0, 0.5, 0.3], [0, 0, 1.0, 0, 0]


def person(seed, **kwargs):
    return draw_face.draw_identity(np.random.default_rng(seed), 96, **kwargs)


def test_the_same_seed_draws_the_same_person():
    assert (person(3).picture == person(3).picture).all()
    assert (person(3).picture != person(4).picture).any()


def test_people_of_the_two_splits_differ():
    assert (person(3).picture != person(3, split="test").picture).any()
    with pytest.raises(ValueError, match="train, test"):
        person(3, split="validation")


def test_the_mouth_lies_at_the_canonical_place():
    mouths = [person(seed).mouth for seed in range(24)]
    assert abs(np.mean([m.x for m in mouths]) / 96 - draw_face.MOUTH_ANCHOR[0]) < 0.02
    assert abs(np.mean([m.y for m in mouths]) / 96 - draw_face.MOUTH_ANCHOR[1]) < 0.02
    assert abs(np.mean([m.unit for m in mouths]) / 96 - draw_face.MOUTH_UNIT) < 0.02


@pytest.mark.parametrize("seed", range(4))
def test_silence_moves_nothing(seed):
    someone = person(seed)
    frames, motion = draw_face.animate(someone, torch.tensor([REST]))
    rest = torch.from_numpy(someone.picture).permute(2, 0, 1).float() / 127.5 - 1
    assert motion.flow.abs().max() < 1e-5 and motion.opacity.max() == 0
    assert_close(frames[0], rest, atol=1e-3, rtol=0)


@pytest.mark.parametrize("seed", range(4))
def test_the_lower_lip_moves_with_the_opening(seed):
    visemes = torch.zeros(5, 5)
    visemes[:, 0] = torch.linspace(0, 1, 5)
    way = puppet.lip_displacement(person(seed).mouth, visemes)
    assert way[0] == 0 and (way.diff() > 0).all()


def test_an_open_resting_mouth_closes_for_a_bilabial_and_a_closed_one_does_not_move():
    smiling = puppet.MouthShape(48, 52, 12, gap=0.4)
    closed = puppet.MouthShape(48, 52, 12)
    assert puppet.lip_displacement(smiling, torch.tensor([CLOSED])) < -0.3
    assert puppet.lip_displacement(closed, torch.tensor([CLOSED])) == 0


def test_an_open_mouth_shows_its_inside_where_the_mouth_is():
    someone = person(1)
    _, motion = draw_face.animate(someone, torch.tensor([WIDE]))
    rows, columns = (motion.opacity[0, 0] > 0.5).nonzero(as_tuple=True)
    assert len(rows) > 20
    assert abs(columns.float().mean() - someone.mouth.x) < someone.mouth.unit
    assert 0 < rows.float().mean() - someone.mouth.y < 1.2 * someone.mouth.unit


def test_a_moving_head_leaves_the_border_of_the_picture_alone():
    _, motion = draw_face.animate(person(2), torch.tensor([REST]), torch.tensor([[0.08, 0.03, 0.02, 0.0]]))
    edge = torch.ones(96, 96, dtype=torch.bool)
    edge[1:-1, 1:-1] = False
    assert motion.flow[0, :, edge].abs().max() < 1e-3 < motion.flow.abs().max()


def test_head_motion_is_gentle_and_blinks():
    track = draw_face.head_motion(np.random.default_rng(0), 250)
    assert track.shape == (250, 4) and track[:, 3].max() == 1
    assert track[:, :3].abs().max() < 0.1
    assert track[:, :3].diff(dim=0).abs().max() < 0.01


def test_a_batch_of_drawn_people_depends_on_its_seed_alone():
    one, same, other = (DrawnFaces(resolution=96)[0, seed] for seed in (5, 5, 6))
    assert all((one[name] == same[name]).all() for name in one)
    assert (one["picture"] != other["picture"]).any()


def test_targets_are_zero_where_they_are_undefined():
    target = motion_targets(person(1).mouth, torch.tensor([WIDE, REST]), None, resolution=96)
    assert target["flow"].shape == (2, 2, 48, 48)
    assert (target["flow"].abs().sum(1, keepdim=True)[target["opacity"] == 1] == 0).all()
    assert (target["interior"][1] == 0).all()
