"""Fits portraits to the size of a video."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from PIL import Image

from sonic.config import PHOTO_SIZE, VideoConfig, parse_size
from sonic.data.image import resized
from sonic.geometry import LARGEST_VIDEO, WAN_MULTIPLE, fit_area, short_side_size, wan_size
from sonic.types import FaceBox, Mouth, Portrait

EVEN = 2  # H.264 with 4:2:0 colour needs even sides


def fit_portrait(portrait: Portrait, video: VideoConfig) -> Portrait:
    """The portrait at the size of the video: at its min_resolution, or scaled down to the area of `size` if larger; with even sides."""
    height, width = portrait.pixels.shape[:2]
    if video.min_resolution:
        new_width, new_height = short_side_size(width, height, video.min_resolution, multiple=EVEN)
    else:
        new_width, new_height = fit_area(width, height, min(LARGEST_VIDEO, _requested_area(width, height, video.size)), multiple=EVEN)
    if (new_width, new_height) == (width // 2 * 2, height // 2 * 2):
        return replace(portrait, pixels=np.ascontiguousarray(portrait.pixels[:new_height, :new_width]))
    across, down = new_width / width, new_height / height
    face, mouth, scale = portrait.face, portrait.mouth, math.sqrt(across * down)
    return Portrait(
        resized(portrait.pixels, new_height, new_width),
        FaceBox(face.x * across, face.y * down, face.width * across, face.height * down),
        Mouth(mouth.x * across, mouth.y * down, mouth.half_width * scale, mouth.angle),
        lips=None if portrait.lips is None else portrait.lips * (across, down),
        eyes=None if portrait.eyes is None else portrait.eyes * (across, down),
        head_offset=portrait.head_offset * scale,
    )


def wan_video_size(width: int, height: int, video: VideoConfig) -> tuple[int, int]:
    """The (width, height) that published models generate for a photograph: at its min_resolution, or within the area of `size`."""
    if video.min_resolution:
        return short_side_size(width, height, video.min_resolution, multiple=WAN_MULTIPLE)
    return wan_size(width, height, _requested_area(width, height, video.size))


def _requested_area(width: int, height: int, size: str) -> int:
    """The area in pixels that a video of `size` may have at most, of a photograph of width and height."""
    return min(LARGEST_VIDEO, width * height) if size == PHOTO_SIZE else math.prod(parse_size(size))


def published_picture(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """The picture at the size of a Wan video, fitted as in the published pipelines.

    Its shorter side is scaled to the shorter side of the video; then it is padded with black or cropped around its centre.

    uint8 [H,W,3] -> uint8 [height,width,3]
    """
    high, wide = pixels.shape[:2]
    short, target = min(high, wide), min(height, width)
    new_high, new_wide = (target if side == short else int(target * side / short) for side in (high, wide))
    small = np.asarray(Image.fromarray(pixels).resize((new_wide, new_high), Image.Resampling.BILINEAR))
    bars = [(max(0, size - have) // 2, (max(0, size - have) + 1) // 2) for size, have in ((height, new_high), (width, new_wide))]
    filled = np.pad(small, [*bars, (0, 0)])
    top, left = (round((have - size) / 2) for size, have in ((height, filled.shape[0]), (width, filled.shape[1])))
    return np.ascontiguousarray(filled[top : top + height, left : left + width])
