"""The face that speaks in a photograph: where it is, where its mouth is, and why there is none.

Views of the photograph are searched with BlazeFace, every face that it finds is read by FaceMesh, and confirmed by looking at it once
more, upright and at the size that the detectors see best.  What is no face for the mesh is none: no video is better than a mouth on
a meadow.  All coordinates are photo pixels.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace

import numpy as np
from PIL import Image

from sonic.data.face_detector import LAYOUTS, Detection, EyeReader, FaceDetector, FaceMesh, Landmarks
from sonic.types import Crop, FaceBox, Mouth, Portrait

# Fitted by `sonic bench faces` to 500 drawn people of the training split, whose mouths and crops are known, so that the preview sees
# real faces as it saw those in training (medians; the spread of the size is 4 %, that of the mouth's width 6 %)
SIZE = 1.92  # side of the face box, in geometric means of the distance of the eyes and that from the eyes to the mouth
WIDTH = 0.98  # the mouth's width in distances of the mesh's corners of it
INNER = 0.35  # the middle of the mouth lies between the middle of its corners (0) and that of the inner edges of the lips (1)
BOX_MIDDLE = 0.25  # the face box ends at the chin when its middle lies this far from the mouth to the eyes

FULL_RANGE, BOTH = "face_detection_full_range", tuple(LAYOUTS)
CANDIDATE, TRIED = 0.3, 6  # least score of a face that is read at all, and how many are read in a view
CONFIDENT, CERTAIN = 0.5, 0.7  # confidence to accept a face, and to end the search
NEAR = 0.3  # detections whose middles are closer, in sides of their boxes, are the same face
HARDLY = 0.05  # confidence below which an error does not speak of what was seen
TIE = 0.8  # a second face with at least this share of the first one's merit causes a warning
TILES = (0.5, 0.25)  # sides of the enlarged views, in sides of the photo, for faces below 8 % and below 4 % of it
SMALLEST_TILE = 200  # px: faces that need a smaller one have less than 32 px
MARGINS = (1.0, 1.6)  # sides of the views of the whole photo: a face that fills it is seen better with a margin
QUARTER_TURNS = (0.0, math.pi / 2, math.pi, -math.pi / 2)
SAME_MOUTH = 0.5  # a given mouth whose middle is closer to that of the landmarks, in halves of its width, has their lips
SMALLEST_FACE = 16  # px: least side of a given face box
OVERRIDE = "face_box=[x,y,w,h] face.mouth=[x,y,half_width] in pixels of the photo"

Views = tuple[Sequence[str], Sequence[Crop]]  # names of detectors, and what they look at


@dataclass(frozen=True)
class Face:
    """A face in a photo: its landmarks, and the confidence 0..1 that it is one."""

    landmarks: Landmarks
    confidence: float

    @property
    def angle(self) -> float:
        """Roll in radians: the mean direction of the lines through the eyes and through the corners of the mouth."""
        across = np.diff(self.landmarks.eye_centres, axis=0)[0] + np.diff(self.landmarks.corners, axis=0)[0]
        return math.atan2(across[1], across[0])

    @property
    def mouth(self) -> Mouth:
        """The mouth; of an open one, the middle between the lips."""
        found = self.landmarks
        x, y = (1 - INNER) * found.corners.mean(axis=0) + INNER * found.inner_edges.mean(axis=0)
        return Mouth(float(x), float(y), WIDTH / 2 * math.dist(*found.corners), self.angle)

    @property
    def box(self) -> FaceBox:
        """The square from the brows to the chin."""
        eyes, mouth = self.landmarks.eye_centres, np.array([self.mouth.x, self.mouth.y])
        down = math.dist(eyes.mean(axis=0), mouth)
        side = SIZE * math.sqrt(math.dist(*eyes) * down)
        x, y = mouth + BOX_MIDDLE * (eyes.mean(axis=0) - mouth) - side / 2
        return FaceBox(float(x), float(y), side, side)

    @property
    def head_offset(self) -> float:
        """Px from the mouth to the middle of the face's outline, along the line of the mouth."""
        view, mouth = self.landmarks.view, self.mouth
        return float(math.cos(mouth.angle) * (view.center_x - mouth.x) + math.sin(mouth.angle) * (view.center_y - mouth.y))


class FaceFinder:
    """Finds the faces of photos; holds the networks, so one thread uses it at a time."""

    def __init__(self) -> None:
        self._detectors, self._mesh = {name: FaceDetector(name) for name in LAYOUTS}, FaceMesh()

    def faces(self, pixels: np.ndarray) -> list[Face]:
        """All faces of a photo, the surest first; the search ends as soon as one is certain.  pixels uint8 [H,W,3]"""
        picture = Image.fromarray(pixels)
        return self._search(picture, _search_order(*picture.size), lambda face: True)

    def face_in(self, pixels: np.ndarray, box: FaceBox) -> Face | None:
        """The surest face whose middle lies in a box; None when there is none."""
        picture, middle, side = Image.fromarray(pixels), np.array(box.middle), max(box.width, box.height)
        order = [next(_search_order(*picture.size))]  # which gives the same numbers as a search without the box
        order += [(BOTH, [Crop(*middle, 2 * side, turn, 1)]) for turn in QUARTER_TURNS]
        inside = lambda face: (np.abs(face.box.middle - middle) < np.array([box.width, box.height]) / 2).all()  # noqa: E731 - a predicate
        return next(iter(self._search(picture, order, inside)), None)

    def follow(self, frame: np.ndarray, last: Landmarks) -> Landmarks | None:
        """The landmarks of a face in a frame of a video near the one that has the landmarks `last`; None when it is not seen there."""
        seen = self._mesh(Image.fromarray(frame), last.view)
        return seen if seen.presence >= CONFIDENT else None

    def _search(self, picture: Image.Image, order: Iterable[Views], wanted: Callable[[Face], bool]) -> list[Face]:
        """The wanted faces of the groups of views until one is certain, the surest first."""
        found: list[Face] = []
        for names, views in order:
            found = _distinct([*found, *filter(wanted, self._seen(picture, views, names))])
            if found and found[0].confidence >= CERTAIN:
                break
        return found

    def _seen(self, picture: Image.Image, views: Sequence[Crop], names: Sequence[str]) -> list[Face]:
        """The faces that these detectors find in these views."""
        looks = [(self._detectors[name], view) for view in views for name in names]
        detections = (found for detector, view in looks for found in detector(picture, view, CANDIDATE)[:TRIED])
        kept: list[Detection] = []
        for found in sorted(detections, key=lambda found: -found.score):
            if all(math.dist(found.middle, other.middle) > NEAR * max(found.side, other.side) for other in kept):
                kept.append(found)
        read = (self._mesh(picture, found.view()) for found in kept)
        return [Face(landmarks, self._confidence(picture, landmarks)) for landmarks in read]

    def _confidence(self, picture: Image.Image, landmarks: Landmarks) -> float:
        """The mesh's presence times the detector's score for the face in its own upright view, where it must see the same eyes."""
        view, eyes = replace(landmarks.view, side=2 * landmarks.view.side), landmarks.eye_centres
        again = self._detectors[FULL_RANGE](picture, view, CANDIDATE)
        same = (found.score for found in again if np.abs(found.eyes - eyes).max() < math.dist(*eyes) / 2)
        return landmarks.presence * max(same, default=0.0)


def portrait_of(pixels: np.ndarray, face_box: Sequence[float] | None = None, mouth: Sequence[float] | None = None) -> Portrait:
    """A photo with its face and mouth, which can be given: [x, y, w, h], and [x, y, half_width(, angle in radians)].

    Without them the largest, most central face speaks, with a warning when several are equally good. Eyes are known where a face is
    seen at the given place too.
    Raises ValueError when no face is certain enough, its mouth lies outside the photo, or what is given is no box or mouth in it.
    """
    box = None if face_box is None else checked_box(pixels, face_box)
    given = None if mouth is None else _checked_mouth(pixels, mouth)
    finder = FaceFinder()
    face = find_speaker(pixels, finder) if box is None else finder.face_in(pixels, box)
    known = face is not None and face.confidence >= CONFIDENT
    box = box or face.box
    if given is not None and len(mouth) == 3:
        given = replace(given, angle=face.angle if known else 0.0)
    if given is None and not known:
        raise ValueError(f"no mouth is seen in face_box={list(face_box)}{_seen_there(face)}; give face.mouth=[x,y,half_width] too")
    given, (high, wide) = given or face.mouth, pixels.shape[:2]
    if not (0 <= given.x <= wide and 0 <= given.y <= high):
        cut = f"the face at {_in_words(face.box)} is cut off: its mouth lies outside the photo ({wide}x{high} px)"
        raise ValueError(f"{cut}; use a photo that shows the mouth, or choose another face with face_box=[x,y,w,h]")
    # rounded, so that the log's face_box and face.mouth, given as overrides, make the same video
    face_box = FaceBox(*(round(value, 2) for value in astuple(box)))
    x, y, half_width = (round(value, 2) for value in (given.x, given.y, given.half_width))
    portrait = Portrait(pixels, face_box, Mouth(x, y, half_width, round(given.angle, 4)))
    if not known:
        return portrait
    same_mouth = math.dist((x, y), (face.mouth.x, face.mouth.y)) < SAME_MOUTH * half_width
    lips, eyes = face.landmarks.lips.round(2) if same_mouth else None, EyeReader()(Image.fromarray(pixels), face.landmarks)
    return replace(portrait, lips=lips, eyes=eyes, head_offset=face.head_offset)


def find_speaker(pixels: np.ndarray, finder: FaceFinder, *, way_out: str = f"or give {OVERRIDE}") -> Face:
    """The largest, most central face of a photo, uint8 [H,W,3].

    Raises ValueError when none is certain enough, with another `way_out`; warns when several are equally good, and takes the leftmost.
    """
    found = finder.faces(pixels)
    faces = [face for face in found if face.confidence >= CONFIDENT]
    if not faces:
        seen = f", but something like one{_seen_there(found[0])}" if found and found[0].confidence >= HARDLY else ""
        size = f"{pixels.shape[1]}x{pixels.shape[0]} px"
        raise ValueError(f"no face is seen in the photo ({size}){seen}; use a photo in which a face is clearly visible, {way_out}")
    return _choose(faces, pixels.shape[1], pixels.shape[0])


def _seen_there(face: Face | None) -> str:
    if face is None:
        return ""
    return f" at {_in_words(face.box)} with confidence {face.confidence:.2f} (at least {CONFIDENT} is needed)"


def _in_words(box: FaceBox) -> str:
    return "[" + ",".join(f"{value:.0f}" for value in astuple(box)) + "]"


def _choose(faces: Sequence[Face], wide: int, high: int) -> Face:
    """Choose the largest, most central, surest face; the leftmost of equally good ones."""

    def merit(face: Face) -> float:
        off = math.hypot((face.box.middle[0] - wide / 2) / wide, (face.box.middle[1] - high / 2) / high)
        return face.box.width * face.confidence * math.exp(-2 * off**2)

    best = max(merit(face) for face in faces)
    equals = sorted((face for face in faces if merit(face) >= TIE * best), key=lambda face: face.box.middle[0])
    if len(equals) > 1:
        warnings.warn(
            f"{len(equals)} faces are equally good: the leftmost, {_in_words(equals[0].box)}, was taken; face_box=[x,y,w,h] chooses",
            stacklevel=4,
        )
    return equals[0]


def _distinct(faces: Iterable[Face]) -> list[Face]:
    """The faces, the surest first, without those that were found before in another view."""
    kept: list[Face] = []
    for face in sorted(faces, key=lambda face: -face.confidence):
        if all(math.dist(face.box.middle, other.box.middle) > max(face.box.width, other.box.width) / 2 for other in kept):
            kept.append(face)
    return kept


def _search_order(wide: int, high: int) -> Iterator[Views]:
    """The detectors and the views of a photo that are searched with them, one group after the other: whole, enlarged parts, and whole
    after quarter turns. Where the views are many, only the faster detector looks, which sees faces of every size."""
    side = max(wide, high)
    for margin in MARGINS:
        yield BOTH, [Crop(wide / 2, high / 2, margin * side, 0.0, 1)]
    yield (
        [FULL_RANGE],
        [
            Crop(x, y, share * side, 0.0, 1)
            for share in TILES
            if share * side >= SMALLEST_TILE
            for y in _middles(high, share * side)
            for x in _middles(wide, share * side)
        ],
    )
    yield [FULL_RANGE], [Crop(wide / 2, high / 2, margin * side, turn, 1) for turn in QUARTER_TURNS[1:] for margin in MARGINS]


def _middles(length: int, tile: float) -> np.ndarray:
    """Middles of tiles that cover a length and overlap by half."""
    count = max(1, math.ceil(2 * length / tile) - 1)
    return np.linspace(tile / 2, length - tile / 2, count) if count > 1 else np.array([length / 2])


def checked_box(pixels: np.ndarray, face_box: Sequence[float]) -> FaceBox:
    """The face that is given as [x, y, w, h]. Raises ValueError unless it lies in the photo and is large enough for one."""
    give = "give it as face_box=[x,y,w,h] in pixels of the photo"
    if len(face_box) != 4:
        raise ValueError(f"face_box={list(face_box)} has {len(face_box)} numbers; {give}")
    box = FaceBox(*(float(number) for number in face_box))
    high, wide = pixels.shape[:2]
    if not (
        0 <= box.x + box.width / 2 <= wide and 0 <= box.y + box.height / 2 <= high and max(box.width, box.height) <= 2 * max(wide, high)
    ):
        raise ValueError(f"face_box={list(face_box)} leaves the photo, which is {wide}x{high} px; {give}")
    if min(box.width, box.height) < SMALLEST_FACE:
        raise ValueError(f"face_box={list(face_box)} is too small for a face: at least {SMALLEST_FACE} px a side; {give}")
    return box


def _checked_mouth(pixels: np.ndarray, mouth: Sequence[float]) -> Mouth:
    high, wide = pixels.shape[:2]
    if len(mouth) not in (3, 4):
        raise ValueError(f"mouth={list(mouth)} has {len(mouth)} numbers; give [x, y, half_width] in pixels of the photo")
    given = Mouth(*(float(number) for number in mouth))
    if not (0 <= given.x <= wide and 0 <= given.y <= high) or not 2 <= given.half_width <= wide / 2:
        raise ValueError(f"mouth={list(mouth)} does not lie in the photo ({wide}x{high} px); give [x, y, half_width] in its pixels")
    return given
