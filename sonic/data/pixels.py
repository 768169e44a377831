"""Conversion of pixels between bytes (files) and floats in [-1, 1] (networks)."""

from __future__ import annotations

import numpy as np
import torch
from einops import rearrange
from torch import Tensor


def signed(picture: np.ndarray) -> Tensor:
    """A picture as networks read it.  uint8 [H,W,3] -> [1,3,H,W] in [-1,1]"""
    return to_signed(rearrange(torch.from_numpy(np.ascontiguousarray(picture)), "h w c -> 1 c h w"))


def to_signed(pixels: Tensor) -> Tensor:
    """uint8 in 0..255 -> float32 in [-1,1]; any shape"""
    return pixels.float() / 127.5 - 1


def to_bytes(signed: Tensor) -> Tensor:
    """Floats in [-1,1], clamped -> uint8 in 0..255; any shape"""
    return ((signed.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
