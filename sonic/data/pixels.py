"""Conversion of pixels between bytes (files) and floats in [-1, 1] (networks)."""

from __future__ import annotations

import torch
from torch import Tensor


def to_signed(pixels: Tensor) -> Tensor:
    """uint8 in 0..255 -> float32 in [-1,1]; any shape"""
    return pixels.float() / 127.5 - 1


def to_bytes(signed: Tensor) -> Tensor:
    """Floats in [-1,1], clamped -> uint8 in 0..255; any shape"""
    return ((signed.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
