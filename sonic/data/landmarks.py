"""Where the face and its mouth are in a photograph, in photo pixels; nothing here is learned by this repository."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image
from skimage import data, feature

from sonic.types import FaceBox, Mouth

MOUTH_IN_BOX = (0.5, 0.80)  # where the cascade's box has the mouth
HALF_WIDTH_IN_BOX = 0.20


def find_face(pixels: np.ndarray, face_box: Sequence[float] | None = None) -> FaceBox:
    """The largest, most central face.  pixels uint8 [H,W,3]"""
    if face_box is not None:
        return FaceBox(*map(float, face_box))
    votes = [box for side in (360, 400, 440) for box in _detect(pixels, side, 0.1)]
    groups = _agree(votes)
    if not groups:
        raise ValueError("no face found; give it as face_box=[x,y,w,h] in pixels of the photo")
    x, y, size = np.median(max(groups, key=len), axis=0)
    return FaceBox(float(x), float(y), float(size), float(size))


def locate_mouth(pixels: np.ndarray, face: FaceBox, mouth: Sequence[float] | None = None) -> Mouth:
    """The mouth of a face."""
    if mouth is not None:
        return Mouth(*map(float, mouth))
    return Mouth(face.x + MOUTH_IN_BOX[0] * face.width, face.y + MOUTH_IN_BOX[1] * face.height, HALF_WIDTH_IN_BOX * face.width)


@lru_cache(maxsize=1)
def _cascade() -> feature.Cascade:
    return feature.Cascade(data.lbp_frontal_face_cascade_filename())


def _detect(pixels: np.ndarray, side: int, smallest: float) -> list[tuple[float, float, float]]:
    scale = side / max(pixels.shape[:2])
    size = [max(24, round(length * scale)) for length in pixels.shape[1::-1]]
    small = np.asarray(Image.fromarray(pixels).resize(size, Image.BOX if scale < 1 else Image.BICUBIC))
    least = max(24, int(smallest * side))
    found = []
    for mirrored in (False, True):
        view = np.ascontiguousarray(small[:, ::-1]) if mirrored else small
        limits = {"min_size": (least, least), "max_size": (side, side), "min_neighbor_number": 1}
        for hit in _cascade().detect_multi_scale(img=view, scale_factor=1.2, step_ratio=1, **limits):
            left = size[0] - hit["c"] - hit["width"] if mirrored else hit["c"]
            found.append((left / scale, hit["r"] / scale, hit["width"] / scale))
    return found


def _agree(votes: list[tuple[float, float, float]]) -> list[list[tuple[float, float, float]]]:
    groups: list[list[tuple[float, float, float]]] = []
    for x, y, size in sorted(votes, key=lambda box: box[2]):
        for group in groups:
            left, top, wide = np.median(group, axis=0)
            apart = np.hypot(x + size / 2 - left - wide / 2, y + size / 2 - top - wide / 2)
            if apart < 0.3 * max(size, wide) and max(size, wide) < 1.6 * min(size, wide):
                group.append((x, y, size))
                break
        else:
            groups.append([(x, y, size)])
    return groups
