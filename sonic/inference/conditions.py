"""Fits pictures to the size of a video, and draws head poses."""

from __future__ import annotations

import math

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from sonic.config import PHOTO_SIZE, HeadConfig, parse_size
from sonic.data.clips import pose_latents
from sonic.data.image import covering, resized
from sonic.data.pixels import to_signed
from sonic.geometry import FRAMES_PER_LATENT, fit_area, wan_size
from sonic.synthetic.draw_face import head_motion
from sonic.types import FaceBox, Mouth, Portrait

LARGEST_VIDEO = 3840 * 2160
EVEN = 2  # H.264 with 4:2:0 colour needs even sides


def fit_portrait(portrait: Portrait, size: str) -> Portrait:
    """The portrait at the size of the video: scaled down to the area of `size` if it is larger, with even sides."""
    height, width = portrait.pixels.shape[:2]
    wide, high = (width, height) if size == PHOTO_SIZE else parse_size(size)
    area = min(LARGEST_VIDEO, width * height if size == PHOTO_SIZE else wide * high)
    new_width, new_height = fit_area(width, height, area, multiple=EVEN)
    if (new_width, new_height) == (width // 2 * 2, height // 2 * 2):
        return Portrait(np.ascontiguousarray(portrait.pixels[:new_height, :new_width]), portrait.face, portrait.mouth)
    across, down = new_width / width, new_height / height
    face, mouth, scale = portrait.face, portrait.mouth, math.sqrt(across * down)
    return Portrait(
        resized(portrait.pixels, new_height, new_width),
        FaceBox(face.x * across, face.y * down, face.width * across, face.height * down),
        Mouth(mouth.x * across, mouth.y * down, mouth.half_width * scale, mouth.angle),
    )


def generated_area(pixels: np.ndarray, size: str) -> int:
    """The largest area in pixels that a Wan video of `size` may have."""
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


def head_pose(motion: HeadConfig, num_frames: int, *, grid: tuple[int, int], seed: int) -> Tensor | None:
    """Pose latents [1,16,T,h,w] of a random head motion that starts in the pose of the photograph; None without head motion.

    The values do not depend on the position in the picture, so h and w are expanded axes that take no memory.
    """
    if motion.head == "off" or motion.strength == 0:
        return None
    track = head_motion(np.random.default_rng([seed, 1]), num_frames, motion.strength)
    settle_in = 1 - torch.exp(-torch.arange(num_frames) / 12.5)  # from the photograph's pose, time constant 0.5 s
    track[:, :3] *= rearrange(settle_in, "f -> f 1")
    constant = pose_latents(rearrange(track, "f j -> 1 f j"), 1, 1)
    return constant.expand(-1, -1, -1, *grid)


def whole_blocks(num_frames: int, block_frames: int) -> int:
    """`num_frames` rounded up to whole blocks, in video frames."""
    step = FRAMES_PER_LATENT * block_frames
    return math.ceil(num_frames / step) * step


def signed(pixels: np.ndarray) -> Tensor:
    """uint8 [H,W,3] -> [1,3,H,W] in [-1,1]"""
    return to_signed(rearrange(torch.from_numpy(np.ascontiguousarray(pixels)), "h w c -> 1 c h w"))
