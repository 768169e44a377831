"""What Sonic's UNet sees of a photograph: the picture that its VAE encodes, the mask of the face, and the picture for CLIP."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from sonic.data.image import covering
from sonic.data.pixels import to_signed
from sonic.geometry import WAN_MULTIPLE
from sonic.types import FaceBox

MASK_SIDES = 1.1  # sides of the mask in sides of the face box, so that its area is 1.21 times that of the box
CLIP_SIDE = 224
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class SvdPicture:
    """ref [3,H,W] in [-1,1]; face_mask [1,H,W] in [0,1]; clip_pixels [3,224,224], normalised as CLIP was trained."""

    ref: Tensor
    face_mask: Tensor
    clip_pixels: Tensor

    @classmethod
    def of(
        cls, pixels: np.ndarray, face: FaceBox | None, size: tuple[int, int], *, upstream: bool = False, mask_sides: float = MASK_SIDES
    ) -> SvdPicture:
        """The photograph uint8 [H,W,3] at `size` (width, height); its mask covers the face box in photo pixels, without a box everything.

        The picture is cropped to the aspect of `size`, and the mask with it; `upstream` squeezes both into it.
        """
        fit = squeezed if upstream else covering
        picture = fit(pixels, *size)
        mask = np.full_like(pixels, 255) if face is None else face_rectangle(face, *pixels.shape[1::-1], sides=mask_sides)
        share = lambda some: rearrange(torch.from_numpy(some), "h w c -> c h w").float() / 255  # noqa: E731
        mean, std = (rearrange(torch.tensor(numbers), "c -> c 1 1") for numbers in (CLIP_MEAN, CLIP_STD))
        clip_pixels = (share(squeezed(picture, CLIP_SIDE, CLIP_SIDE)) - mean) / std
        return cls(to_signed(rearrange(torch.from_numpy(picture), "h w c -> c h w")), share(fit(mask, *size))[:1], clip_pixels)


def published_svd_size(width: int, height: int, short: int) -> tuple[int, int]:
    """The (width, height) to which the published code squeezes a picture: each side is the nearest multiple of 64, of two the even one."""
    scale = short / min(width, height)
    return tuple(round(side * scale / WAN_MULTIPLE) * WAN_MULTIPLE for side in (width, height))


def squeezed(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """The picture resized without regard to its aspect, as the published code does.  uint8 [H,W,3] -> uint8 [height,width,3]"""
    return np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))


def face_rectangle(face: FaceBox, width: int, height: int, *, sides: float) -> np.ndarray:
    """A white rectangle on black with `sides` times the sides of the face box, as the published code draws it.  -> uint8 [H,W,3]"""
    across, down = face.width * sides // 2, face.height * sides // 2
    x, y = (2 * face.x + face.width) // 2, (2 * face.y + face.height) // 2
    mask = np.zeros((height, width, 3), np.uint8)
    mask[int(max(0, y - down)) : int(min(height, y + down)), int(max(0, x - across)) : int(min(width, x + across))] = 255
    return mask


def face_square(face: FaceBox, width: int, height: int, *, margin: float) -> tuple[int, int, int, int]:
    """The square (left, top, right, bottom) around a face to which the published code can crop a photograph of width and height first.

    The face box grows by `margin` of its sides on each side, within the photograph. The square is as large as the shorter side of that;
    along the longer one its centre moves from that of the grown box towards that of the face, as far as the grown box allows.
    """

    def grown(start: float, length: float, limit: int) -> tuple[float, float]:
        return max(0, start - margin * length), min(limit, start + length + margin * length)

    (left, right), (top, bottom) = grown(face.x, face.width, width), grown(face.y, face.height, height)
    side = min(right - left, bottom - top)

    def along(low: float, high: float, middle: float) -> tuple[int, int]:
        room = (high - low - side) / 2
        centre = (low + high) / 2
        centre += min(room, max(-room, middle - centre))
        return round(centre - side / 2), round(centre + side / 2)

    (x1, x2), (y1, y2) = along(left, right, face.x + face.width / 2), along(top, bottom, face.y + face.height / 2)
    return x1, y1, x2, y2
