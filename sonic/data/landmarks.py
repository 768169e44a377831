"""Face and mouth detection in a photograph, in photo pixels.

scikit-image's bundled cascade proposes boxes, the face filter scores and aligns them, and mouth.py fits the lips.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from skimage import data, feature
from torch import Tensor

from sonic.data.face_filter import FacePose, Guess, align
from sonic.data.mouth import read_mouth
from sonic.types import FaceBox, Mouth

BOX_UNITS = 24.0  # side of the cascade's box in template pixels of the face filter
BOX_RISE = 1.3  # the box's middle lies this many template pixels above the template's
SMALLEST_FACE, LEAST_FACE = 16, 32  # px: least side of a given face box, and of a detected one
ENOUGH, CERTAIN = 1.62, 1.65  # evidence (agreement 0..1 + response about 1) to accept a face, and to end the search
TIE = 0.8  # a second face with at least this share of the first one's merit causes a warning
OVERRIDE = "give it as face_box=[x,y,w,h] in pixels of the photo"


@dataclass(frozen=True)
class Search:
    """One pass of the cascade: longest sides (px) to which the photo is reduced, smallest face as a share of them, rotations (degrees)."""

    sides: tuple[int, ...]
    smallest: float
    rotations: tuple[float, ...] = (0.0,)


SEARCHES = (
    Search((360, 400, 440), 0.10),
    Search((360, 400, 440), 0.10, (-20.0, 0.0, 20.0)),
    Search((560, 640, 720), 0.045),
)


@dataclass(frozen=True)
class Candidate:
    """A candidate face: its pose in photo px and the evidence for it."""

    pose: FacePose
    evidence: float


def find_face(pixels: np.ndarray, face_box: Sequence[float] | None = None) -> FaceBox:
    """Find the largest, most central face of a photo, or check the given box.  pixels uint8 [H,W,3]

    Raises ValueError when there is no face; warns when several are equally good and names the one taken.
    """
    if face_box is not None:
        return _checked_box(pixels, face_box)
    faces: list[Candidate] = []
    for search in SEARCHES:
        faces += _faces(pixels, search)
        if any(face.evidence > CERTAIN for face in faces):
            break
    faces = [face for face in faces if face.evidence > ENOUGH]
    if not faces:
        raise ValueError(f"no face found in the photo ({pixels.shape[1]}x{pixels.shape[0]} px); {OVERRIDE}, or use a frontal portrait")
    return _choose(faces, pixels.shape[1], pixels.shape[0])


def locate_mouth(pixels: np.ndarray, face: FaceBox, mouth: Sequence[float] | None = None) -> Mouth:
    """Find the mouth of a face, or check the given one: [x, y, half_width] or [x, y, half_width, roll in radians].

    The position is the middle of the line where the lips meet; of an open mouth, the middle between the lips.  `angle` is the
    roll of the face.
    """
    given = None if mouth is None else _checked_mouth(pixels, mouth)
    if given is not None and len(mouth) == 4:
        return given
    window, scale, left, top = _window(pixels, face)
    pose = _pose(window, face, scale=scale, corner=(left, top))
    if given is not None:
        return replace(given, angle=pose.angle)
    fitted = read_mouth(window, pose)
    return Mouth(left + fitted.x / scale, top + fitted.y / scale, fitted.half_width / scale, fitted.angle)


def _pose(window: Tensor, face: FaceBox, *, scale: float, corner: tuple[int, int]) -> FacePose:
    """Align the face filter to the face in its window."""
    x, y = (face.x + face.width / 2 - corner[0]) * scale, (face.y + face.height / 2 - corner[1]) * scale
    size = math.sqrt(face.width * face.height) * scale
    unit = size / BOX_UNITS
    return align(window.mean(-1), Guess(x, y + BOX_RISE * unit, unit, shift=0.08 * size))


def _checked_box(pixels: np.ndarray, face_box: Sequence[float]) -> FaceBox:
    if len(face_box) != 4:
        raise ValueError(f"face_box={list(face_box)} has {len(face_box)} numbers; {OVERRIDE}")
    box = FaceBox(*(float(number) for number in face_box))
    high, wide = pixels.shape[:2]
    if box.x < 0 or box.y < 0 or box.x + box.width > wide or box.y + box.height > high:
        raise ValueError(f"face_box={list(face_box)} leaves the photo, which is {wide}x{high} px; {OVERRIDE}")
    if min(box.width, box.height) < SMALLEST_FACE:
        raise ValueError(f"face_box={list(face_box)} is too small for a face: at least {SMALLEST_FACE} px a side; {OVERRIDE}")
    return box


def _checked_mouth(pixels: np.ndarray, mouth: Sequence[float]) -> Mouth:
    high, wide = pixels.shape[:2]
    if len(mouth) not in (3, 4):
        raise ValueError(f"mouth={list(mouth)} has {len(mouth)} numbers; give [x, y, half_width] in pixels of the photo")
    given = Mouth(*(float(number) for number in mouth))
    if not (0 <= given.x <= wide and 0 <= given.y <= high) or not 2 <= given.half_width <= wide / 2:
        raise ValueError(f"mouth={list(mouth)} does not lie in the photo ({wide}x{high} px); give [x, y, half_width] in its pixels")
    return given


def _choose(faces: Sequence[Candidate], wide: int, high: int) -> FaceBox:
    """Choose the largest, most central face; the leftmost of equally good ones."""

    def merit(face: Candidate) -> float:
        off = math.hypot((face.pose.x - wide / 2) / wide, (face.pose.y - high / 2) / high)
        return face.pose.unit * math.exp(3 * face.evidence - 2 * off**2)

    ranked = sorted(faces, key=merit, reverse=True)
    equals = [ranked[0]]
    for face in ranked[1:]:
        apart = min(math.hypot(face.pose.x - other.pose.x, face.pose.y - other.pose.y) for other in equals)
        if merit(face) >= TIE * merit(ranked[0]) and apart > BOX_UNITS / 2 * face.pose.unit:
            equals.append(face)
    equals.sort(key=lambda face: face.pose.x)
    chosen = _box(equals[0].pose)
    if len(equals) > 1:
        box_text = f"[{chosen.x:.0f},{chosen.y:.0f},{chosen.width:.0f},{chosen.height:.0f}]"
        warnings.warn(
            f"{len(equals)} faces are equally good: the leftmost, {box_text}, was taken; face_box=[x,y,w,h] chooses", stacklevel=3
        )
    return chosen


def _box(pose: FacePose) -> FaceBox:
    side = BOX_UNITS * pose.unit
    rise = BOX_RISE * pose.unit
    x, y = pose.x + rise * math.sin(pose.angle), pose.y - rise * math.cos(pose.angle)
    return FaceBox(x - side / 2, y - side / 2, side, side)


def _faces(pixels: np.ndarray, search: Search) -> list[Candidate]:
    """All candidate faces of one search."""
    small, scale = _reduced(pixels, max(search.sides))
    picture = Image.fromarray(small)
    groups = _agree(
        vote for turn in search.rotations for side in search.sides for vote in _votes(picture, side, search.smallest, turn=turn)
    )
    likely = sorted((group for group in groups if len(group) > 1), key=len, reverse=True)[:6]
    grey = torch.from_numpy(small).float().mean(-1) / 255
    faces: list[Candidate] = []
    for group in likely:
        if any(face.evidence > CERTAIN for face in faces) and len(group) < len(likely[0]) / 2:
            break
        x, y, size = np.median(group, axis=0)[:3].tolist()
        turn = float(np.mean([vote[3] for vote in group]))
        guess = Guess(x, y + BOX_RISE * size / BOX_UNITS, size / BOX_UNITS, shift=0.08 * size, roll=turn)
        pose = align(grey, guess)
        evidence = min(1.0, len(group) / (2 * len(search.sides))) + min(1.0, pose.response)
        faces.append(Candidate(FacePose(pose.x / scale, pose.y / scale, pose.unit / scale, pose.angle, pose.response), evidence))
    return faces


@lru_cache(maxsize=1)
def _cascade() -> feature.Cascade:
    return feature.Cascade(data.lbp_frontal_face_cascade_filename())


def _votes(picture: Image.Image, side: int, smallest: float, *, turn: float) -> list[tuple[float, float, float, float]]:
    """Boxes that the cascade finds in a photo and its mirror image at one size and rotation: middle x, y, size (px), roll (radians)."""
    scale = side / max(picture.size)
    wide, high = (max(1, round(length * scale)) for length in picture.size)
    small = picture.resize((wide, high), Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC)
    turned = np.asarray(small.rotate(turn, Image.Resampling.BILINEAR))  # counter-clockwise in degrees, which cancels a roll of +turn
    roll = math.radians(turn)
    cos, sin = math.cos(roll), math.sin(roll)
    least = max(24, int(smallest * side), int(LEAST_FACE * scale))
    limits = {"min_size": (least, least), "max_size": (side, side), "min_neighbor_number": 1}
    boxes = []
    for mirrored in (False, True):
        view = np.ascontiguousarray(turned[:, ::-1] if mirrored else turned)
        for hit in _cascade().detect_multi_scale(img=view, scale_factor=1.2, step_ratio=1, **limits):
            size = hit["width"]
            x, y = hit["c"] + size / 2 - wide / 2, hit["r"] + size / 2 - high / 2
            x = -x if mirrored else x
            boxes.append(((cos * x - sin * y + wide / 2) / scale, (sin * x + cos * y + high / 2) / scale, size / scale, roll))
    return boxes


def _agree(votes: Iterable[tuple[float, float, float, float]]) -> list[list[tuple[float, float, float, float]]]:
    """Group the boxes that nearly coincide."""
    groups: list[list[tuple[float, float, float, float]]] = []
    for vote in sorted(votes, key=lambda box: box[2]):
        for group in groups:
            x, y, size, _ = np.median(group, axis=0)
            larger, smaller = max(size, vote[2]), min(size, vote[2])
            if math.hypot(vote[0] - x, vote[1] - y) < 0.3 * larger and larger < 1.6 * smaller:
                group.append(vote)
                break
        else:
            groups.append([vote])
    return groups


def _reduced(pixels: np.ndarray, longest: int) -> tuple[np.ndarray, float]:
    """Reduce the photo to at most `longest` px on its longer side; gives it and the scale."""
    scale = min(1.0, longest / max(pixels.shape[:2]))
    size = [max(1, round(length * scale)) for length in pixels.shape[1::-1]]
    if scale == 1.0:
        return np.array(pixels), 1.0
    return np.array(Image.fromarray(pixels).resize(size, Image.Resampling.BOX, reducing_gap=2.0)), scale


def _window(pixels: np.ndarray, face: FaceBox) -> tuple[Tensor, float, int, int]:
    """Surroundings of a face, reduced to at most 512 px: picture [h,w,3] in [0,1], scale, and (left, top) of its corner in the photo."""
    high, wide = pixels.shape[:2]
    x, y, radius = face.x + face.width / 2, face.y + face.height / 2, 1.1 * max(face.width, face.height)
    left, top = max(0, math.floor(x - radius)), max(0, math.floor(y - radius))
    region = pixels[top : min(high, math.ceil(y + radius)), left : min(wide, math.ceil(x + radius))]
    small, scale = _reduced(region, 512)
    return torch.from_numpy(np.ascontiguousarray(small)).float() / 255, scale, left, top
