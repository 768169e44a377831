"""Heads that turn about their neck and blink: what moves, what does not, and what a closed lid covers."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from torch.testing import assert_close

from sonic.data.face_detector import EyeReader, FaceMesh
from sonic.data.faces import FaceFinder, find_speaker, portrait_of
from sonic.data.image import face_crop
from sonic.geometry import NECK
from sonic.synthetic.draw_face import draw_identity, head_motion
from sonic.types import MotionLayers
from sonic.vae.eyelids import close_eyes
from sonic.vae.head import MovingHead
from sonic.vae.warp import Canvas


@pytest.fixture(scope="module")
def portrait():
    """The astronaut's head and shoulders, [260,260,3], with her landmarks."""
    return portrait_of(np.ascontiguousarray(data.astronaut()[0:260, 90:350]))


def picture(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0).float()


def moving(portrait, *poses: tuple[float, float, float, float]) -> MovingHead:
    return MovingHead(portrait, face_crop(portrait), torch.tensor(poses))


def still_layers(frames: int) -> MotionLayers:
    return MotionLayers(*(torch.zeros(1, frames, channels, 96, 96) for channels in (2, 1, 3)))


def rendered(portrait, *poses: tuple[float, float, float, float]) -> torch.Tensor:
    """The portrait in those poses, whose mouth is at rest.  -> uint8 [F,H,W,3]"""
    head = moving(portrait, *poses)
    return Canvas(portrait, face_crop(portrait), head).render(still_layers(len(poses)))


def between_lids(outlines: np.ndarray, height: int, width: int) -> torch.Tensor:
    """White where the eyes are open, black elsewhere.  -> [1,3,height,width]"""
    ys, xs = np.mgrid[:height, :width] + 0.5
    inside = np.zeros((height, width), bool)
    for outline in outlines:
        after = np.roll(outline, -1, axis=0)
        crossed = [
            ((a[1] > ys) != (b[1] > ys)) & (xs < (b[0] - a[0]) * (ys - a[1]) / (b[1] - a[1] + 1e-12) + a[0])
            for a, b in zip(outline, after, strict=True)
        ]
        inside ^= np.logical_xor.reduce(crossed)
    return torch.from_numpy(inside).float().expand(1, 3, -1, -1)


def test_the_outlines_of_the_lids_hold_the_eyes(portrait):
    middles = np.array([[204.0 - 90, 101.3], [246.8 - 90, 103.8]])  # marked by eye
    assert np.abs(portrait.eyes.mean(axis=1) - middles).max() < 0.04 * portrait.face.width
    open_eyes = between_lids(portrait.eyes, 260, 260)[0, 0].bool()
    inside, around = (portrait.pixels[where.numpy()].mean(axis=-1) for where in (open_eyes, ~open_eyes))
    assert np.quantile(inside, 0.25) < 100 < np.median(around)  # they hold the dark irises


def test_a_closed_lid_covers_the_eye_and_a_half_closed_one_covers_half(portrait):
    eye = between_lids(portrait.eyes, 260, 260)
    left = [float(close_eyes(eye, portrait.eyes, closed).sum() / eye.sum()) for closed in (0.25, 0.5, 0.75, 1.0)]
    assert left[0] > left[1] > left[2] > left[3]
    assert left[1] == pytest.approx(0.5, abs=0.15) and left[3] < 0.1


def test_the_network_of_the_eyes_sees_them_close(portrait):
    def openings(pixels: np.ndarray) -> float:
        face = Image.fromarray(pixels)
        outlines = EyeReader()(face, FaceMesh()(face, view))
        return sum(np.ptp(outline[:, 1]) / np.ptp(outline[:, 0]) for outline in outlines)

    view = find_speaker(portrait.pixels, FaceFinder()).landmarks.view
    shut = close_eyes(picture(portrait.pixels), portrait.eyes, 1.0)[0].permute(1, 2, 0).clamp(0, 255).byte().numpy()
    assert openings(shut) < 0.6 * openings(portrait.pixels)


@pytest.mark.parametrize("number", range(4))
def test_drawn_people_close_the_eyes_that_they_have(number):
    person = draw_identity(np.random.default_rng([17, number]), 192, split="test", photographs=0)
    found = portrait_of(person.picture)
    ys, xs = np.mgrid[:192, :192] + 0.5
    irises = sum(((xs - x) / high) ** 2 + ((ys - y) / high) ** 2 < 0.7 for x, y, _, high in person.mouth.eyes)
    irises = torch.from_numpy(irises > 0).float().expand(1, 3, -1, -1)
    assert (close_eyes(irises, found.eyes, 1.0) * irises).sum() < 0.15 * irises.sum()


@pytest.mark.parametrize("degrees", [0, 90, 180])
def test_only_the_eyes_and_the_skin_above_them_change_whichever_way_up_the_photo_is(degrees, portrait):
    turns = degrees // 90
    pixels = np.ascontiguousarray(np.rot90(portrait.pixels, turns))
    outlines = portrait.eyes - 130
    for _ in range(turns):
        outlines = np.stack([outlines[..., 1], -outlines[..., 0]], axis=-1)
    shut = close_eyes(picture(pixels), outlines + 130, 1.0)
    upright = close_eyes(picture(portrait.pixels), portrait.eyes, 1.0)
    assert_close(torch.rot90(upright, turns, (2, 3)), shut, atol=0.01, rtol=0)
    changed = (shut != picture(pixels)).any(1)[0]
    assert changed.sum() > 100
    rows, columns = changed.nonzero().unbind(1)
    for points, values in ((rows, outlines[..., 1] + 130), (columns, outlines[..., 0] + 130)):
        margin = 0.5 * np.ptp(portrait.eyes[0, :, 0])
        assert values.min() - margin < points.min() and points.max() < values.max() + margin


@pytest.mark.parametrize("move", [(-200, 0), (0, -100), (0, -80), (200, 0), (0, 300)])
def test_eyes_beyond_the_border_of_the_photo_are_closed_where_they_show(move, portrait):
    shut = close_eyes(picture(portrait.pixels), portrait.eyes + move, 1.0)
    assert shut.shape == (1, 3, 260, 260) and shut.isfinite().all()


def test_a_head_in_the_pose_of_the_photograph_leaves_every_pixel(portrait):
    assert (rendered(portrait, (0, 0, 0, 0), (0, 0, 0, 0)) == torch.from_numpy(portrait.pixels)).all()


def test_a_blink_leaves_everything_but_the_eyes(portrait):
    shut, before = rendered(portrait, (0, 0, 0, 1), (0, 0, 0, 0))
    assert (before == torch.from_numpy(portrait.pixels)).all()
    expected = close_eyes(picture(portrait.pixels), portrait.eyes, 1.0)[0].permute(1, 2, 0).round().clamp(0, 255)
    assert (shut.float() - expected).abs().max() <= 1 and (shut != before).any()


def test_the_head_turns_as_a_rigid_body_about_the_neck(portrait):
    roll = 0.1
    head = moving(portrait, (roll, 0, 0, 0))
    mouth = portrait.mouth
    down = torch.tensor([-math.sin(mouth.angle), math.cos(mouth.angle)])
    neck = torch.tensor([mouth.x, mouth.y]) + NECK * mouth.half_width * down
    assert torch.linalg.vector_norm(head.neck - neck) < 0.6 * mouth.half_width  # a frontal head
    face = torch.from_numpy(np.concatenate([portrait.eyes.reshape(-1, 2), [[mouth.x, mouth.y]]])).float()
    found = head.rest(face.unsqueeze(0), slice(0, 1))[0, 0]
    from_neck = face - head.neck
    turned = torch.tensor([[math.cos(roll), -math.sin(roll)], [math.sin(roll), math.cos(roll)]])  # back, counterclockwise on the screen
    assert_close(found - head.neck, from_neck @ turned, atol=1e-3, rtol=0)


def test_shoulders_background_and_border_do_not_move_with_the_head(portrait):
    frame = rendered(portrait, (0.1, 0.03, 0.02, 0))[0]
    same = (frame == torch.from_numpy(portrait.pixels)).all(-1)
    shoulders = round(portrait.mouth.y + 5 * portrait.mouth.half_width)
    assert same[0].all() and same[:, 0].all() and same[:, -1].all() and same[shoulders:].all()
    assert not same[80:150, 100:170].all()


def test_the_neck_of_a_head_that_is_turned_lies_behind_the_mouth(portrait):
    turned, crop = replace(portrait, head_offset=20.0), face_crop(portrait)
    before, after = (MovingHead(found, crop, torch.zeros(1, 4)).neck for found in (portrait, turned))
    along = torch.tensor([math.cos(crop.angle), math.sin(crop.angle)])
    assert_close(after - before, (20.0 - portrait.head_offset) * along)
    assert abs(portrait.head_offset) < 0.1 * portrait.face.width  # she looks at the camera


def test_people_blink_every_few_seconds():
    minutes, frames = 4, 25 * 60
    track = head_motion(np.random.default_rng(0), minutes * frames)[:, 3]
    blinks = int(((track[1:] > 0) & (track[:-1] == 0)).sum())
    assert 12 * minutes <= blinks <= 25 * minutes
