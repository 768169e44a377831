"""The UNet with audio attention at its published size, and its exact savings."""

from __future__ import annotations

from hashlib import sha256

import torch

from sonic.config import UNetConfig
from sonic.model.svd_unet import SvdUNet

PUBLISHED = "d6eb9410e3245902ac8f6341b8c5563fe7f872a17b7fa48146a7166ca9a05d70"  # of the lines "name [shape]" in order


def test_the_tensors_have_the_published_names_and_shapes():
    with torch.device("meta"):
        tensors = SvdUNet(UNetConfig()).state_dict()
    lines = sorted(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
    assert len(lines) == 1492
    assert sum(tensor.numel() for tensor in tensors.values()) == 1_575_741_162
    assert sha256("\n".join(lines).encode()).hexdigest() == PUBLISHED
    assert {tensor.device.type for tensor in tensors.values()} == {"meta"}
