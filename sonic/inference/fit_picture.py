"""Fits portraits to the size of a video."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from sonic.config import PHOTO_SIZE, parse_size
from sonic.data.image import covering, resized
from sonic.data.pixels import to_signed
from sonic.geometry import fit_area, wan_size
from sonic.types import FaceBox, Mouth, Portrait

LARGEST_VIDEO = 3840 * 2160  # pixels of a frame
EVEN = 2  # H.264 with 4:2:0 colour needs even sides


def fit_portrait(portrait: Portrait, size: str) -> Portrait:
    """The portrait at the size of the video: scaled down to the area of `size` if it is larger, with even sides."""
    height, width = portrait.pixels.shape[:2]
    area = min(LARGEST_VIDEO, requested_area(portrait.pixels, size))
    new_width, new_height = fit_area(width, height, area, multiple=EVEN)
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


def requested_area(pixels: np.ndarray, size: str) -> int:
    """The area in pixels that a video of `size` may have at most."""
    if size == PHOTO_SIZE:
        return min(LARGEST_VIDEO, pixels.shape[0] * pixels.shape[1])
    width, height = parse_size(size)
    return width * height


def whole_picture(pixels: np.ndarray, max_area: int) -> np.ndarray:
    """The picture at the size of a Wan video: scaled to cover that size, then cropped around its centre.

    uint8 [H,W,3] -> uint8 [height,width,3]
    """
    high, wide = pixels.shape[:2]
    return covering(pixels, *wan_size(wide, high, max_area))


def published_picture(pixels: np.ndarray, max_area: int) -> np.ndarray:
    """The picture at the size of a Wan video, fitted as in the published pipelines.

    Its shorter side is scaled to the shorter side of the video; then it is padded with black or cropped around its centre.

    uint8 [H,W,3] -> uint8 [height,width,3]
    """
    high, wide = pixels.shape[:2]
    width, height = wan_size(wide, high, max_area)
    short, target = min(high, wide), min(height, width)
    new_high, new_wide = (target if side == short else int(target * side / short) for side in (high, wide))
    small = np.asarray(Image.fromarray(pixels).resize((new_wide, new_high), Image.Resampling.BILINEAR))
    bars = [(max(0, size - have) // 2, (max(0, size - have) + 1) // 2) for size, have in ((height, new_high), (width, new_wide))]
    filled = np.pad(small, [*bars, (0, 0)])
    top, left = (round((have - size) / 2) for size, have in ((height, filled.shape[0]), (width, filled.shape[1])))
    return np.ascontiguousarray(filled[top : top + height, left : left + width])


def signed(pixels: np.ndarray) -> Tensor:
    """uint8 [H,W,3] -> [1,3,H,W] in [-1,1]"""
    return to_signed(rearrange(torch.from_numpy(np.ascontiguousarray(pixels)), "h w c -> 1 c h w"))
