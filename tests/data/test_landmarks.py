"""Detection of face and mouth, independent of size, rotation, light and colour of the photograph."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from torch.testing import assert_close

from sonic.data import face_filter, landmarks
from sonic.data.eyes import read_eyes
from sonic.data.landmarks import find_face, locate_mouth
from sonic.data.mouth import USUAL, Evidence, fit_lens, positions
from sonic.types import FaceBox, Mouth

LEFT, TOP, SIDE = 90, 0, 260  # the part of the astronaut's photograph that is used here
MOUTH, HALF_WIDTH = (224.0 - LEFT, 145.0 - TOP), 20.3  # by eye: between the lips, from corner to corner
EYE_LINE = ((204.0 - LEFT, 101.3 - TOP), (246.8 - LEFT, 103.8 - TOP))


@pytest.fixture(scope="module")
def astronaut() -> np.ndarray:
    """Head and shoulders, [260,260,3]."""
    return data.astronaut()[TOP : TOP + SIDE, LEFT : LEFT + SIDE]


@pytest.fixture(scope="module")
def face(astronaut) -> FaceBox:
    """Her face, detected once."""
    return find_face(astronaut)


def resized(picture: np.ndarray, factor: float) -> np.ndarray:
    size = [round(length * factor) for length in picture.shape[1::-1]]
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))


def turned(picture: np.ndarray, degrees: float) -> np.ndarray:
    """Rotate clockwise, as a head that leans to the right of the picture."""
    return np.asarray(Image.fromarray(picture).rotate(-degrees, Image.Resampling.BICUBIC, fillcolor=(120, 120, 120)))


def unturned(point: tuple[float, float], degrees: float) -> tuple[float, float]:
    angle, middle = math.radians(degrees), SIDE / 2
    x, y = point[0] - middle, point[1] - middle
    return math.cos(angle) * x + math.sin(angle) * y + middle, math.cos(angle) * y - math.sin(angle) * x + middle


def test_the_mouth_of_the_astronaut_is_found_where_it_was_marked_by_eye(astronaut, face):
    mouth = locate_mouth(astronaut, face)
    assert math.dist((mouth.x, mouth.y), MOUTH) < 0.03 * face.width
    assert mouth.half_width == pytest.approx(HALF_WIDTH, rel=0.15) and abs(mouth.angle) < 0.08


def test_the_eyes_of_the_astronaut_are_found_where_they_were_marked_by_eye(astronaut, face):
    window, scale, left, top = landmarks._window(astronaut, face)
    eyes = read_eyes(window, landmarks._pose(window, face, scale=scale, corner=(left, top))).numpy() / scale + np.array([left, top])
    assert np.abs(eyes - np.array(EYE_LINE)).max() < 0.04 * face.width


@pytest.mark.parametrize("factor", [0.6, 2.0])
def test_the_size_of_the_photo_does_not_matter(factor, astronaut, face):
    larger = resized(astronaut, factor)
    found = find_face(larger)
    mouth = locate_mouth(larger, found)
    assert found.width / factor == pytest.approx(face.width, rel=0.1)
    assert math.dist((mouth.x / factor, mouth.y / factor), MOUTH) < 0.04 * face.width


@pytest.mark.parametrize("degrees", [-12, 12])
def test_a_tilted_head_is_found_and_its_roll_reported(degrees, astronaut, face):
    tilted = turned(astronaut, degrees)
    mouth = locate_mouth(tilted, find_face(tilted))
    assert math.dist(unturned((mouth.x, mouth.y), degrees), MOUTH) < 0.04 * face.width
    assert mouth.angle == pytest.approx(locate_mouth(astronaut, face).angle + math.radians(degrees), abs=0.06)


def test_mirroring_the_photo_mirrors_the_mouth(astronaut, face):
    mirrored = np.ascontiguousarray(astronaut[:, ::-1])
    mouth, image = locate_mouth(astronaut, face), locate_mouth(mirrored, find_face(mirrored))
    assert math.dist((SIDE - image.x, image.y), (mouth.x, mouth.y)) < 0.03 * face.width


@pytest.mark.parametrize("light", [lambda p: p * 0.5, lambda p: (p * 1.3).clip(0, 255), lambda p: p.mean(-1, keepdims=True).repeat(3, -1)])
def test_light_and_colour_hardly_matter(light, astronaut, face):
    mouth = locate_mouth(light(astronaut.astype(np.float32)).astype(np.uint8), face)
    assert math.dist((mouth.x, mouth.y), MOUTH) < 0.04 * face.width


def test_a_face_box_that_is_a_little_off_finds_the_same_mouth(astronaut, face):
    shifted = FaceBox(face.x + 8, face.y - 7, 1.08 * face.width, 1.08 * face.height)
    mouth = locate_mouth(astronaut, shifted)
    assert math.dist((mouth.x, mouth.y), MOUTH) < 0.03 * face.width


def test_the_override_is_taken_as_it_is(astronaut, face):
    assert find_face(astronaut, [10, 20, 60, 70]) == FaceBox(10, 20, 60, 70)
    assert locate_mouth(astronaut, face, [100, 120, 15, 0.2]) == Mouth(100, 120, 15, 0.2)
    assert abs(locate_mouth(astronaut, face, [100, 120, 15]).angle) < 0.1


def test_without_a_face_the_error_names_the_override():
    with pytest.raises(ValueError, match=r"no face found.*face_box=\[x,y,w,h\]"):
        find_face(np.repeat(data.gravel()[:200, :200, None], 3, axis=-1))


def test_of_two_equal_faces_the_left_one_is_taken_and_named(astronaut, face):
    pair = np.hstack([astronaut, astronaut])
    with pytest.warns(UserWarning, match=r"2 faces.*face_box=\[x,y,w,h\]"):
        found = find_face(pair)
    assert found.x + found.width < SIDE and found.width == pytest.approx(face.width, rel=0.15)


def test_a_smaller_second_face_causes_no_warning(astronaut):
    crowd = np.full((SIDE, 2 * SIDE, 3), 128, np.uint8)
    crowd[:, SIDE // 2 : SIDE // 2 + SIDE] = astronaut
    small = resized(astronaut, 0.4)
    crowd[-small.shape[0] :, -small.shape[1] :] = small
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = find_face(crowd)
    assert abs(found.x + found.width / 2 - SIDE) < 40


def test_without_evidence_the_fit_returns_the_prior():
    nothing = torch.zeros(positions().shape[:2])
    assert_close(fit_lens(Evidence(nothing + 0.32, nothing + 0.25)), USUAL, atol=0.06, rtol=0)


def test_the_lens_finds_a_drawn_mouth():
    x, y = positions().unbind(-1)
    room = 1 - ((x - 0.6) / 4.4) ** 2
    across = y - 5.8
    lips = (across > -0.9 * room) & (across < 1.8 * room)
    slit = torch.exp(-(((across - 0.4 * room) / 0.25) ** 2)) * (room > 0)
    found = fit_lens(Evidence(lips.float(), slit))
    assert_close(found[:3], torch.tensor([0.6, 5.8, 4.4]), atol=0.3, rtol=0)


def test_fitting_reproduces_the_bundled_filter():
    made, bundled = face_filter.fit(), face_filter.load()
    assert torch.cosine_similarity(made.weights.flatten(), bundled.weights.flatten(), dim=0) > 0.999


def test_the_filter_responds_to_faces_and_not_to_scenery():
    small = torch.from_numpy(data.lfw_subset()).float()[:, None, :, : face_filter.COLUMNS]
    seen = face_filter.channels(small) * face_filter.oval()
    length = seen.flatten(1).norm(dim=1) + 1e-3
    known = face_filter.load()
    response = (seen * known.weights).flatten(1).sum(1) * face_filter.LOUDNESS / length + known.offset
    assert (response[:100] > 0.5).float().mean() >= 0.95 and (response[100:] < 0.5).float().mean() >= 0.949
