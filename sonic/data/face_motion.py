"""How much a face moves in a video: the two motion buckets of each frame that Sonic's UNet is trained with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.ndimage import uniform_filter1d

from sonic.data.face_detector import Landmarks
from sonic.data.segments import smoothed

SPAN = 25  # frames at 25 a second: the second around a frame, which is also what the network that predicts buckets from sound reads
UNITS = 1000  # buckets in a distance of the eyes
JITTER = 0.004  # distances of the eyes by which the landmarks of a still face move from frame to frame


def motion_buckets(faces: Sequence[Landmarks]) -> np.ndarray:
    """Movement of the head and strength of the expression around each frame, in thousandths of the distance of the eyes.  -> [F,2]

    Both are root mean square distances from the mean position in the second around the frame. The head is where the middle between the
    eyes is, which moves with the face box but not with the mouth. The expression is the outlines of lids and lips, moved, turned and
    scaled so that the eyes are always at the same place. What landmarks of a still face move by counts as no movement.
    """
    eyes = np.stack([face.eye_centres for face in faces])
    points = np.stack([np.concatenate([face.eyes.reshape(-1, 2), face.lips.reshape(-1, 2)]) for face in faces])
    (left, right), outlines = _complex(eyes).T, _complex(points)
    middle, across = (left + right) / 2, right - left
    shapes = (outlines - middle[:, None]) / across[:, None]
    return UNITS * np.stack([_spread(middle[:, None] / np.abs(across).mean()), _spread(shapes)], axis=1)


def _complex(points: np.ndarray) -> np.ndarray:
    """Points as complex numbers x + iy, each a running mean over a few frames.  [F,n,2] -> [F,n]"""
    x, y = np.moveaxis(smoothed(points), -1, 0)
    return x + 1j * y


def _spread(tracks: np.ndarray) -> np.ndarray:
    """Root mean square distance of points from their mean in the span around each frame, without jitter.  complex [F,n] -> [F]"""
    tracks = tracks - tracks.mean(axis=0)
    x, y = _around(tracks.real), _around(tracks.imag)
    variance = (_around(np.abs(tracks) ** 2) - x**2 - y**2).mean(axis=1)
    return np.sqrt(np.maximum(0.0, variance - JITTER**2))


def _around(values: np.ndarray) -> np.ndarray:
    """The mean over the frames of the span around each frame that exist.  [F,n] -> [F,n]"""
    total, count = (uniform_filter1d(some, SPAN, axis=0, mode="constant") for some in (values, np.ones_like(values)))
    return total / count
