"""Arithmetic of time and size: video frames, latent frames, blocks, the sizes of pictures, and where mouth and neck lie in a face."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

FRAMES_PER_LATENT = 4
PIXELS_PER_LATENT = 8
FPS = 25
GIB = 2**30
LARGEST_VIDEO = 3840 * 2160  # pixels of a frame
WAN_MULTIPLE = 64  # of the sides of published videos
MOUTH_ANCHOR = (0.5, 0.55)  # x, y of the middle of the mouth in the canonical face crop, as shares of its side
MOUTH_UNIT = 0.125  # half the mouth's width in that crop: 0.20 of the face box over a side of 1.6 boxes
NECK = 2.2  # the neck, about which the head rotates, lies so many halves of the mouth's width below the mouth


@dataclass(frozen=True)
class BlockSpan:
    """The time span of one block of a rollout; `start` counts latent frames from the beginning of the video."""

    index: int
    start: int
    latent_frames: int

    @property
    def stop(self) -> int:
        """First latent frame after the block."""
        return self.start + self.latent_frames

    @property
    def first_frame(self) -> int:
        """First video frame of the block."""
        return FRAMES_PER_LATENT * self.start

    @property
    def frames(self) -> int:
        """Video frames in the block."""
        return FRAMES_PER_LATENT * self.latent_frames


def frames_of_audio(num_samples: int, sample_rate: int, fps: int = FPS) -> int:
    """Number of video frames of a recording, rounded to the nearest whole number, at least one."""
    return max(1, round(num_samples * fps / sample_rate))


def plan_blocks(num_frames: int | None, block_frames: int = 3) -> Iterator[BlockSpan]:
    """The blocks of a video of `num_frames` frames, in order, the last one perhaps longer than needed; an endless iterator when it is
    None."""
    indices = itertools.count() if num_frames is None else range(math.ceil(num_frames / (FRAMES_PER_LATENT * block_frames)))
    return (BlockSpan(index, index * block_frames, block_frames) for index in indices)


def fit_area(width: int, height: int, max_area: int, *, multiple: int = 2) -> tuple[int, int]:
    """The largest (width, height) of about the same aspect ratio within `max_area` pixels; sides are multiples of `multiple`.

    Pictures are never enlarged; sides are rounded down, but not below one multiple.
    """
    scale = min(1.0, math.sqrt(max_area / (width * height)))
    fitted = (max(multiple, int(side * scale) // multiple * multiple) for side in (width, height))
    return tuple(fitted)


def short_side_size(width: int, height: int, short: int, *, multiple: int) -> tuple[int, int]:
    """The (width, height) of a video with about the aspect of a picture and a short side of `short`, in multiples of `multiple`.

    The short side is rounded up, the long side to the nearest. Raises ValueError when the frames would be larger than LARGEST_VIDEO.
    """
    narrow, wide = sorted((width, height))
    most = math.isqrt(LARGEST_VIDEO * narrow // wide) // 2 * 2
    if short > most:
        picture = f"video.min_resolution={short} makes a {width}x{height} photograph larger than a video can be (the area of 3840x2160)"
        raise ValueError(f"{picture}; use {most} or less")
    side = math.ceil(short / multiple) * multiple
    fitted = (round(each * side / narrow / multiple) * multiple for each in (width, height))
    return tuple(fitted)


def wan_size(width: int, height: int, max_area: int, *, multiple: int = WAN_MULTIPLE) -> tuple[int, int]:
    """The (width, height) that the published pipeline generates for a picture: sides rounded up to `multiple` at the largest of a
    hundred scales at which their product stays within `max_area`; small pictures are not enlarged.

    Source: the size search of Wan2.2-S2V, with the same range of scales, because the range decides between two possible sizes.
    """
    area, slack = width * height, (multiple - 1) * (width + height)
    lowest, highest = 0.1, 1.0
    if area > max_area:
        lowest = (math.sqrt(slack**2 - 2 * area * ((multiple - 1) ** 2 - max_area)) - slack) / (2 * area)
        highest = math.sqrt(max_area / area)
    for step in range(100):
        scale = highest - (highest - lowest) * step / 100
        fitted = tuple(math.ceil(int(side * scale) / multiple) * multiple for side in (width, height))
        if math.prod(fitted) <= max_area:
            return fitted
    aspect = math.sqrt(width / height)
    rounded = tuple(int(side // multiple * multiple) for side in (math.sqrt(max_area) * aspect, math.sqrt(max_area) / aspect))
    too_large = rounded[0] >= width or rounded[1] >= height
    return (width // multiple * multiple, height // multiple * multiple) if too_large else rounded


def pixels_around(middle: float, radius: float, size: int) -> slice:
    """The rows or columns of a picture within `radius` of `middle`, at least one."""
    start = min(max(0, math.floor(middle - radius)), size - 1)
    return slice(start, max(start + 1, min(size, math.ceil(middle + radius))))


def smoothstep(t: Any) -> Any:
    """0 below 0, 1 above 1, and smooth between; t is an array or a tensor."""
    t = t.clip(0, 1)
    return t * t * (3 - 2 * t)
