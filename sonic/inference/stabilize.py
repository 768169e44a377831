"""Takes the jitter of the face out of generated pixels: frames are warped so that the face follows its own motion, smoothed over time.

The landmarks say where the face is; they are read with an error of about half a pixel, so how the face moves from frame to frame is
registered in the pixels around the eyes and the nose, which speech does not move.  Shapes: H and W the rows and columns of a frame.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from scipy.signal import resample
from torch import Tensor
from torch.nn import functional as F

from sonic.data.face_detector import Landmarks
from sonic.data.faces import CONFIDENT, FaceFinder
from sonic.geometry import pixels_around
from sonic.inference.stream import windows
from sonic.vae.warp import unit_grid

LOOK_EVERY = 25  # frames, because looking for a face takes longer than following it
RIGID = 1.3  # radius of what is registered around the eyes, in their distances
WITHIN, BEYOND = 2.0, 3.2  # the whole motion is applied within so many distances of the eyes, and none beyond
VIEW = 128  # side in px at which the motion is registered
ROUNDS = 10  # Gauss-Newton steps
OUTLIER = 8.0  # grey levels: a larger difference, as of a blink, counts little
MARGIN = 16  # px around a resampled region, against ringing at its border
LEAST, MOST = 0.01, 0.1  # px and distances of the eyes: what moves less is left alone, and what moves more is no jitter


class TrackedFrame(NamedTuple):
    """A frame uint8 [H,W,3], the landmarks of its face if one is seen, and how that face has moved since the first frame.

    `moved` is the similarity z -> scale z + shift of points z = x + iy in px, as the complex matrix [[scale, shift], [0, 1]].
    """

    pixels: Tensor
    face: Landmarks | None
    moved: np.ndarray


def stabilize(chunks: Iterable[Tensor], kernel: np.ndarray) -> Iterator[Tensor]:
    """The chunks of frames, uint8 [F,H,W,3], in which the motion of the face is smoothed by a kernel of an odd number of frames.

    Frames in which no face is seen stay as they are.
    """
    for group in windows(_track(chunks), len(kernel) // 2):
        yield torch.stack([_steadied(window, kernel) for window in group])


def _track(chunks: Iterable[Tensor]) -> Iterator[list[TrackedFrame]]:
    """Follow the face through the frames; while there is none, it is looked for in every LOOK_EVERY-th frame."""
    finder, last, index = FaceFinder(), TrackedFrame(torch.empty(0), None, np.eye(2, dtype=complex)), 0
    for chunk in chunks:
        found = []
        for pixels in chunk:
            if last.face is None:
                seen = finder.faces(pixels.numpy()) if index % LOOK_EVERY == 0 else []
                face = seen[0].landmarks if seen and seen[0].confidence >= CONFIDENT else None
                last = TrackedFrame(pixels, face, last.moved)
            else:
                moved = _motion(last.pixels, pixels, last.face) @ last.moved
                last = TrackedFrame(pixels, finder.follow(pixels.numpy(), last.face), moved)
            found.append(last)
            index += 1
        yield found


def _motion(before: Tensor, after: Tensor, face: Landmarks) -> np.ndarray:
    """How the rigid part of a face moves from one frame to the next, by Gauss-Newton steps over its grey levels; as
    `TrackedFrame.moved`.

    Source: Hager and Belhumeur, Efficient Region Tracking With Parametric Models, 1998.
    """
    middle, radius = face.eye_centres.mean(axis=0), RIGID * math.dist(*face.eye_centres)
    size = torch.tensor([before.shape[1], before.shape[0]])
    blur = round(radius / VIEW) * 2 + 1  # px, odd: about a pixel of the view, which has fewer than a large frame
    circle = unit_grid(VIEW, VIEW, torch.empty(0, dtype=torch.float64))
    x, y = circle.unbind(-1)
    grey = [rearrange(frame, "h w c -> 1 c h w").double().mean(1, keepdim=True) for frame in (before, after)]
    first, second = (F.avg_pool2d(frame, blur, 1, blur // 2, count_include_pad=False) for frame in grey)

    def view(frame: Tensor, motion: Tensor) -> Tensor:
        scale, turn, right, down = motion
        points = circle + torch.stack([scale * x - turn * y + right, turn * x + scale * y + down], -1)
        grid = (points * radius + torch.from_numpy(middle)) / size * 2 - 1
        return F.grid_sample(frame, grid[None], mode="bicubic", padding_mode="border", align_corners=False)[0, 0]

    motion = torch.zeros(4, dtype=torch.float64)
    still = view(first, motion)
    down, across = (part * VIEW / 2 for part in torch.gradient(still))
    slopes = torch.stack([across * x + down * y, down * x - across * y, across, down], -1)
    inside = (1 - circle.square().sum(-1)).clamp(min=0)
    for _ in range(ROUNDS):
        error = view(second, motion) - still
        weight = inside / (1 + (error / OUTLIER).square())
        left = torch.einsum("hwi,hwj,hw->ij", slopes, slopes, weight)
        right = torch.einsum("hwi,hw,hw->i", slopes, error, weight)
        motion = motion - torch.linalg.lstsq(left, right).solution
    if not motion.abs().max() < 0.5:  # a cut
        return np.eye(2)
    scale, turn, right, down = motion.tolist()
    linear, centre = complex(1 + scale, turn), complex(*middle)
    return np.array([[linear, centre + complex(right, down) * radius - linear * centre], [0, 1]])


def _steadied(window: tuple[TrackedFrame, ...], kernel: np.ndarray) -> Tensor:
    """The middle frame of a window, warped so that its face lies where the smoothed motion puts it."""
    now = window[len(kernel) // 2]
    if now.face is None:
        return now.pixels
    smoothed = np.tensordot(kernel, [frame.moved for frame in window], axes=1)
    scale, shift = (now.moved @ np.linalg.inv(smoothed))[0]  # from where the face should be to where it is
    pixels = now.pixels
    middle, eyes = now.face.eye_centres.mean(axis=0), math.dist(*now.face.eye_centres)
    rows, columns = (pixels_around(middle[axis], BEYOND * eyes, pixels.shape[1 - axis]) for axis in (1, 0))
    y, x = np.mgrid[rows, columns] + 0.5
    points = x + 1j * y
    fade = np.clip((BEYOND - np.abs(points - complex(*middle)) / eyes) / (BEYOND - WITHIN), 0, 1)
    offset = (scale * points + shift - points) * fade * fade * (3 - 2 * fade)
    if not LEAST < np.abs(offset).max() < MOST * eyes:
        return pixels
    result = pixels.clone()
    result[rows, columns] = _resampled(pixels[rows, columns], offset)
    return result


def _resampled(region: Tensor, offset: np.ndarray) -> Tensor:
    """Move the pixels of a region uint8 [h,w,3] by complex offsets [h,w]. It is enlarged twofold through its spectrum before, because
    bicubic interpolation at the region's own size would blur it."""
    high, wide = offset.shape
    padded = np.pad(region.float().numpy(), ((MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)), mode="symmetric")
    double = resample(resample(padded, 2 * padded.shape[0], axis=0), 2 * padded.shape[1], axis=1)
    at = np.stack([offset.real + np.arange(wide), offset.imag + np.arange(high)[:, None]], -1) + MARGIN
    grid = torch.from_numpy((2 * at + 0.5) / double.shape[1::-1] * 2 - 1).float()
    source = rearrange(torch.from_numpy(double), "h w c -> 1 c h w")
    moved = F.grid_sample(source, grid[None], mode="bicubic", padding_mode="border", align_corners=False)
    return rearrange(moved, "1 c h w -> h w c").round().clamp(0, 255).to(torch.uint8)
