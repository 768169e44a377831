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
from sonic.inference.time_windows import smoothing_weights, windows
from sonic.vae.warp import unit_grid

RIGID = 1.3  # radius of what is registered around the eyes, in their distances
WITHIN, BEYOND = 2.0, 3.2  # the whole motion is applied within so many distances of the eyes, and none beyond
VIEW = 128  # side in px at which the motion is registered
ROUNDS = 10  # Gauss-Newton steps
OUTLIER = 8.0  # grey levels: a larger difference, as of a blink, counts little
MARGIN = 16  # px around a resampled region, against ringing at its border
LEAST = 0.01  # px: a smaller displacement is not applied


class Similarity(NamedTuple):
    """The map z -> scale * z + shift of points z = x + iy in px of the picture; `scale` turns and enlarges."""

    scale: complex = 1.0
    shift: complex = 0.0

    def after(self, first: Similarity) -> Similarity:
        """The map that applies `first`, then this one."""
        return Similarity(self.scale * first.scale, self.scale * first.shift + self.shift)

    def inverse(self) -> Similarity:
        """The map back."""
        return Similarity(1 / self.scale, -self.shift / self.scale)


class Tracked(NamedTuple):
    """A frame uint8 [H,W,3], the landmarks of its face if one is seen, and how that face has moved since the first frame."""

    pixels: Tensor
    face: Landmarks | None
    moved: Similarity


def stabilize(chunks: Iterable[Tensor], strength: float, fps: int) -> Iterator[Tensor]:
    """The chunks of frames, uint8 [F,H,W,3], with the jitter of the face removed; frames in which no face is seen stay as they are."""
    kernel = smoothing_weights(strength, fps)
    for group in windows(_track(chunks, fps), len(kernel) // 2):
        yield torch.stack([_steadied(window, kernel) for window in group])


def _track(chunks: Iterable[Tensor], fps: int) -> Iterator[list[Tracked]]:
    """Follow the face through the frames; while there is none, it is looked for once a second."""
    finder, last, index = FaceFinder(), Tracked(torch.empty(0), None, Similarity()), 0
    for chunk in chunks:
        found = []
        for pixels in chunk:
            if last.face is None:
                seen = finder.faces(pixels.numpy()) if index % fps == 0 else []
                face = seen[0].landmarks if seen and seen[0].confidence >= CONFIDENT else None
                last = Tracked(pixels, face, last.moved)
            else:
                step = _motion(last.pixels, pixels, last.face)
                last = Tracked(pixels, finder.follow(pixels.numpy(), last.face), step.after(last.moved))
            found.append(last)
            index += 1
        yield found


def _motion(before: Tensor, after: Tensor, face: Landmarks) -> Similarity:
    """How the rigid part of a face moves from one frame to the next, by Gauss-Newton steps over its grey levels.

    Source: Hager and Belhumeur, Efficient Region Tracking With Parametric Models, 1998.
    """
    middle, radius = face.eye_centres.mean(axis=0), RIGID * math.dist(*face.eye_centres)
    size = torch.tensor([before.shape[1], before.shape[0]])
    blur = round(radius / VIEW) * 2 + 1  # px, odd: about two pixels of the view, which is smaller than what it shows of large frames
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
    scale, turn, right, down = motion.tolist()
    centre = complex(*middle)
    linear = complex(1 + scale, turn)
    return Similarity(linear, centre + complex(right, down) * radius - linear * centre)


def _steadied(window: tuple[Tracked, ...], kernel: np.ndarray) -> Tensor:
    """The middle frame of a window, warped so that its face lies where the smoothed motion puts it."""
    now = window[len(kernel) // 2]
    if now.face is None:
        return now.pixels
    moved = [frame.moved.after(now.moved.inverse()) for frame in window]
    target = Similarity(*(complex(kernel @ np.array(part)) for part in zip(*moved, strict=True)))
    back, pixels = target.inverse(), now.pixels
    middle, eyes = now.face.eye_centres.mean(axis=0), math.dist(*now.face.eye_centres)
    rows, columns = (pixels_around(middle[axis], BEYOND * eyes, pixels.shape[1 - axis]) for axis in (1, 0))
    y, x = np.mgrid[rows, columns] + 0.5
    points = x + 1j * y
    fade = np.clip((BEYOND - np.abs(points - complex(*middle)) / eyes) / (BEYOND - WITHIN), 0, 1)
    offset = (back.scale * points + back.shift - points) * fade * fade * (3 - 2 * fade)
    if np.abs(offset).max() < LEAST:
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
    size = np.array([double.shape[1], double.shape[0]])
    grid = torch.from_numpy((2 * at + 0.5) / size * 2 - 1).float()
    source = rearrange(torch.from_numpy(double), "h w c -> 1 c h w")
    moved = F.grid_sample(source, grid[None], mode="bicubic", padding_mode="border", align_corners=False)
    return rearrange(moved, "1 c h w -> h w c").round().clamp(0, 255).to(torch.uint8)
