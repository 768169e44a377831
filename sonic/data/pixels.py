"""Pixels between bytes, as files have them, and -1 to 1, as networks do."""

from __future__ import annotations

import torch
from torch import Tensor


def to_signed(pixels: Tensor) -> Tensor:
    """uint8 in 0..255 -> float32 in [-1,1]; any shape"""
    return pixels.float() / 127.5 - 1


def to_bytes(signed: Tensor) -> Tensor:
    """[-1,1], what is beyond cut off -> uint8 in 0..255; any shape"""
    return ((signed.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
