"""The face that speaks and its mouth, whatever the size, rotation and light of the photograph; and what is no face."""

from __future__ import annotations

import math
import warnings
from importlib import metadata

import numpy as np
import pytest
from PIL import Image
from skimage import data

from sonic.config import VideoConfig
from sonic.data import face_detector
from sonic.data.face_detector import INSTALL, MESH_SIDE, FaceMesh
from sonic.data.faces import CONFIDENT, FaceFinder, find_speaker, portrait_of
from sonic.data.image import face_crop, load_image
from sonic.geometry import MOUTH_ANCHOR, MOUTH_UNIT
from sonic.inference.fit_picture import fit_portrait
from sonic.synthetic.draw_face import draw_identity
from sonic.types import Crop, FaceBox, Mouth

LEFT, TOP, SIDE = 90, 0, 260  # the part of the astronaut's photograph that is used here
MOUTH, HALF_WIDTH = (224.0 - LEFT, 143.0 - TOP), 23.0  # by eye: in the middle of her smile, from corner to corner
EYES = ((204.0 - LEFT, 101.3 - TOP), (246.8 - LEFT, 103.8 - TOP))


@pytest.fixture(scope="module")
def astronaut() -> np.ndarray:
    """Head and shoulders, [260,260,3]."""
    return np.ascontiguousarray(data.astronaut()[TOP : TOP + SIDE, LEFT : LEFT + SIDE])


@pytest.fixture(scope="module")
def found(astronaut):
    """Her portrait, with the face and the mouth that are seen."""
    return portrait_of(astronaut)


def resized(picture: np.ndarray, factor: float) -> np.ndarray:
    size = [round(length * factor) for length in picture.shape[1::-1]]
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))


def turned(picture: np.ndarray, degrees: float) -> np.ndarray:
    """Rotate clockwise, as a head that leans to the right of the picture."""
    return np.array(Image.fromarray(picture).rotate(-degrees, Image.Resampling.BICUBIC, fillcolor=(120, 120, 120)))


def unturned(point: tuple[float, float], degrees: float) -> tuple[float, float]:
    angle, middle = math.radians(degrees), SIDE / 2
    x, y = point[0] - middle, point[1] - middle
    return math.cos(angle) * x + math.sin(angle) * y + middle, math.cos(angle) * y - math.sin(angle) * x + middle


def off(mouth: Mouth, portrait) -> float:
    """Distance of a mouth from the one marked by eye, in widths of the face."""
    return math.dist((mouth.x, mouth.y), MOUTH) / portrait.face.width


def test_the_mouth_is_found_where_it_was_marked_by_eye(found):
    assert off(found.mouth, found) < 0.03
    assert found.mouth.half_width == pytest.approx(HALF_WIDTH, rel=0.1) and abs(found.mouth.angle) < 0.08


def test_the_eyelids_surround_the_eyes_that_were_marked_by_eye(astronaut):
    face = find_speaker(astronaut, FaceFinder())
    assert np.abs(face.landmarks.eye_centres - np.array(EYES)).max() < 0.04 * face.box.width
    assert (
        np.ptp(face.landmarks.eyes[..., 0], axis=1) > 1.5 * np.ptp(face.landmarks.eyes[..., 1], axis=1)
    ).all()  # open, but wider than high


@pytest.mark.parametrize("factor", [0.5, 2.0, 6.0])
def test_the_size_of_the_photo_does_not_matter(factor, astronaut, found):
    larger = portrait_of(resized(astronaut, factor))
    assert larger.face.width / factor == pytest.approx(found.face.width, rel=0.05)
    assert math.dist((larger.mouth.x / factor, larger.mouth.y / factor), MOUTH) < 0.04 * found.face.width


def test_a_photo_of_64_px_speaks(astronaut, found, tmp_path):
    head = Image.fromarray(astronaut).crop((0, 0, 250, 250)).resize((65, 64), Image.Resampling.LANCZOS)
    head.save(tmp_path / "small.png")
    small = portrait_of(load_image(tmp_path / "small.png"))
    assert math.dist((small.mouth.x * 250 / 65, small.mouth.y * 250 / 64), MOUTH) < 0.06 * found.face.width
    assert fit_portrait(small, VideoConfig()).pixels.shape == (64, 64, 3)  # as H.264 needs it


@pytest.mark.parametrize("degrees", [-90, -25, 12, 90, 180])
def test_a_turned_photo_has_its_mouth_turned_with_it(degrees, astronaut, found):
    mouth = portrait_of(turned(astronaut, degrees)).mouth
    assert math.dist(unturned((mouth.x, mouth.y), degrees), MOUTH) < 0.04 * found.face.width
    assert math.remainder(mouth.angle - found.mouth.angle - math.radians(degrees), math.tau) == pytest.approx(0, abs=0.06)


def test_mirroring_the_photo_mirrors_the_mouth(astronaut, found):
    image = portrait_of(np.ascontiguousarray(astronaut[:, ::-1])).mouth
    assert math.dist((SIDE - image.x, image.y), (found.mouth.x, found.mouth.y)) < 0.01 * found.face.width


LIGHTS = {
    "dark": lambda p: 255 * (p / 255) ** 2.2 / 4,
    "bright": lambda p: p * 1.3,
    "grey": lambda p: p.mean(-1, keepdims=True).repeat(3, -1),
}


@pytest.mark.parametrize("light", LIGHTS)
def test_light_and_colour_hardly_matter(light, astronaut, found):
    seen = portrait_of(LIGHTS[light](astronaut.astype(np.float32)).clip(0, 255).astype(np.uint8))
    assert off(seen.mouth, found) < 0.04


def test_a_face_that_fills_the_photo_is_found(astronaut, found):
    face = found.face
    left, top = round(face.x - 0.15 * face.width), round(face.y - 0.2 * face.height)
    close = astronaut[top : top + round(1.3 * face.height), left : left + round(1.3 * face.width)]
    mouth = portrait_of(resized(np.ascontiguousarray(close), 4)).mouth
    assert math.dist((mouth.x / 4 + left, mouth.y / 4 + top), MOUTH) < 0.04 * face.width


@pytest.mark.parametrize("where", [(40, 30), (1100, 900)])
def test_a_face_of_a_twentieth_of_the_photo_is_found(where, astronaut, found):
    wide = np.full((1200, 1600, 3), (110, 130, 150), np.uint8)
    small = resized(astronaut, 80 / found.face.width)
    left, top = where
    wide[top : top + small.shape[0], left : left + small.shape[1]] = small[: 1200 - top, : 1600 - left]
    mouth = portrait_of(wide).mouth
    scale = 80 / found.face.width
    assert math.dist((mouth.x, mouth.y), (left + scale * MOUTH[0], top + scale * MOUTH[1])) < 0.05 * 80


def test_the_same_photo_gives_the_same_numbers(astronaut, found):
    assert portrait_of(astronaut.copy()).face == found.face and portrait_of(astronaut.copy()).mouth == found.mouth


@pytest.mark.parametrize("number", range(6))
def test_the_crop_of_a_drawn_person_is_the_one_that_the_preview_was_trained_on(number):
    person = draw_identity(np.random.default_rng(number), 192, photographs=0)
    portrait = portrait_of(person.picture)
    crop = face_crop(portrait)
    x, y = (anchor - 0.5 for anchor in MOUTH_ANCHOR)
    anchor = np.array([crop.center_x, crop.center_y]) + crop.side * np.array([x, y])
    assert math.dist(anchor, (person.mouth.x, person.mouth.y)) < 0.04 * crop.side
    assert person.mouth.unit / crop.side == pytest.approx(MOUTH_UNIT, rel=0.12)


def test_the_override_is_taken_as_it_is(astronaut, found):
    given = portrait_of(astronaut, [10, 20, 60, 70], [100, 120, 15, 0.2])
    assert given.face == FaceBox(10, 20, 60, 70) and given.mouth == Mouth(100, 120, 15, 0.2)
    turned_with_the_face = portrait_of(astronaut, mouth=[100, 120, 15])
    assert turned_with_the_face.mouth == Mouth(100, 120, 15, found.mouth.angle) and turned_with_the_face.face == found.face


def test_a_mouth_given_on_an_animal_is_not_turned_by_what_the_networks_take_for_a_face():
    cat, box = data.chelsea(), [295, 23, 141, 141]
    assert abs(FaceFinder().face_in(cat, FaceBox(*box)).angle) > 0.3
    assert portrait_of(cat, box, [360, 120, 20]).mouth == Mouth(360, 120, 20, 0.0)


def test_a_face_whose_mouth_is_cut_off_is_refused(astronaut):
    with pytest.raises(ValueError, match=r"is cut off: its mouth lies outside the photo \(260x127 px\)"):
        portrait_of(np.ascontiguousarray(astronaut[:127]))


def test_a_box_that_is_a_little_off_finds_the_same_mouth(astronaut, found):
    face = found.face
    shifted = portrait_of(astronaut, [face.x + 8, face.y - 7, 1.3 * face.width, 1.3 * face.height])
    assert off(shifted.mouth, found) < 0.03


def test_what_the_log_says_gives_the_same_portrait(astronaut, found):
    again = portrait_of(astronaut, *([getattr(part, name) for name in part.__dataclass_fields__] for part in (found.face, found.mouth)))
    assert (again.face, again.mouth) == (found.face, found.mouth)


NO_FACES = {
    "a cat": data.chelsea,  # looks like one to the detector, but not to the mesh
    "a cup": data.coffee,
    "gravel": lambda: np.repeat(data.gravel()[..., None], 3, axis=-1),
    "plain": lambda: np.full((300, 400, 3), 90, np.uint8),
}


@pytest.mark.parametrize("picture", NO_FACES)
def test_a_photo_without_a_face_is_refused_and_the_override_named(picture):
    with pytest.raises(ValueError, match=r"no face is seen.*face_box=\[x,y,w,h\] face.mouth=\[x,y,half_width\]"):
        portrait_of(NO_FACES[picture]())


def test_a_box_without_a_mouth_asks_for_the_mouth(astronaut):
    with pytest.raises(ValueError, match=r"no mouth is seen in face_box=\[5, 200, 50, 50\].*give face.mouth="):
        portrait_of(astronaut, [5, 200, 50, 50])


def test_an_uncertain_face_is_refused_with_its_place_and_confidence(astronaut, monkeypatch):
    monkeypatch.setattr("sonic.data.faces.CONFIDENT", 0.999)
    with pytest.raises(ValueError, match=r"something like one at \[\d+,\d+,\d+,\d+\] with confidence 0\.\d\d \(at least 0.999"):
        portrait_of(astronaut)


def test_of_two_equal_faces_the_left_one_is_taken_and_named(astronaut, found):
    pair = np.hstack([astronaut, astronaut])
    with pytest.warns(UserWarning, match=r"2 faces.*face_box=\[x,y,w,h\]"):
        face = portrait_of(pair).face
    assert face.x + face.width < SIDE and face.width == pytest.approx(found.face.width, rel=0.05)


def test_a_smaller_second_face_causes_no_warning(astronaut):
    crowd = np.full((SIDE, 2 * SIDE, 3), 128, np.uint8)
    crowd[:, SIDE // 2 : SIDE // 2 + SIDE] = astronaut
    small = resized(astronaut, 0.4)
    crowd[-small.shape[0] :, -small.shape[1] :] = small
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        face = portrait_of(crowd).face
    assert abs(face.x + face.width / 2 - SIDE) < 40


def test_the_mesh_refuses_what_is_no_face(astronaut, found):
    mesh, face, picture = FaceMesh(), found.face, Image.fromarray(astronaut)
    seen = mesh(picture, Crop(face.x + face.width / 2, face.y + face.height / 2, 1.8 * face.width, 0.0, MESH_SIDE))
    empty = mesh(picture, Crop(40.0, 210.0, 80.0, 0.0, MESH_SIDE))
    assert seen.presence > 0.99 and empty.presence < CONFIDENT


@pytest.mark.parametrize("number", [79, 163])
def test_lips_on_a_picture_of_anything_are_far_from_a_face(number):
    lips = draw_identity(np.random.default_rng([5, number]), 192, photographs=1).picture
    assert max((face.confidence for face in FaceFinder().faces(lips)), default=0) < 0.6 * CONFIDENT


def test_networks_that_are_not_installed_are_named_with_the_line_that_installs_them(astronaut, monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(face_detector.metadata, "files", missing)
    with pytest.raises(ValueError, match=f"not installed; run: {INSTALL}"):
        portrait_of(astronaut)
