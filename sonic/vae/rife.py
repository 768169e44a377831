"""RIFE: the network IFNet HDv3, which estimates the frame halfway between two frames from optical flow in both directions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from sonic.vae.warp import unit_grid

CHANNELS = 90  # of the published weights
SCALES = (4, 2, 1)  # by which the stages reduce the frames
MULTIPLE = 32  # of the sides of the frames that the stages see
PREFIX, UNUSED = "module.", "block_tea."  # in the published file: before all names, and before those of a stage that only its training used


class RifeResult(NamedTuple):
    """The frame between two frames [B,3,H,W]; the flow of each frame [B,4,H,W] in pixels; the weight of the first one [B,1,H,W]."""

    middle: Tensor
    flow: Tensor
    weight: Tensor


class Rife(nn.Module):
    """The frame halfway between two frames, which stays the same, but for rounding, when the two are swapped.

    Source: Huang et al., Real-Time Intermediate Flow Estimation for Video Frame Interpolation, arXiv 2011.06294, version HDv3.
    """

    def __init__(self, channels: int = CHANNELS) -> None:
        super().__init__()
        self.block0, self.block1, self.block2 = (FlowStage(channels) for _ in SCALES)

    def forward(self, first: Tensor, second: Tensor) -> RifeResult:
        """Two frames [B,3,H,W] in [0,1] of any size -> the frame between them, not clamped, with what it was made from."""
        height, width = first.shape[-2:]
        pair = [F.pad(frame, (0, -width % MULTIPLE, 0, -height % MULTIPLE)) for frame in (first, second)]
        flow = first.new_zeros(len(first), 4, *pair[0].shape[-2:])
        mask, warped = flow[:, :1], pair
        for stage, scale in zip((self.block0, self.block1, self.block2), SCALES, strict=True):
            there = torch.cat((*warped, mask, flow), dim=1)
            back = torch.cat((*warped[::-1], -mask, swapped(flow)), dim=1)
            (flow_there, flow_back), (mask_there, mask_back) = (each.chunk(2) for each in stage(torch.cat((there, back)), scale))
            flow = flow + (flow_there + swapped(flow_back)) / 2
            mask = mask + (mask_there - mask_back) / 2
            warped = [warp(frame, part) for frame, part in zip(pair, flow.chunk(2, dim=1), strict=True)]
        weight = mask.sigmoid()
        middle = warped[0] * weight + warped[1] * (1 - weight)
        return RifeResult(*(each[..., :height, :width] for each in (middle, flow, weight)))

    @torch.no_grad()
    def middle(self, first: Tensor, second: Tensor) -> Tensor:
        """The frame between two frames.  twice [B,3,H,W] in [0,1] -> [B,3,H,W] in [0,1]"""
        return self(first, second).middle.clamp(0, 1)


class FlowStage(nn.Module):
    """One stage: what is to be added to the flow and to the mask, estimated from frames, mask and flow at a reduced size."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv0 = nn.Sequential(convolution(11, half, stride=2), convolution(half, channels, stride=2))
        self.convblock0, self.convblock1, self.convblock2, self.convblock3 = (
            nn.Sequential(convolution(channels, channels), convolution(channels, channels)) for _ in range(4)
        )
        self.conv1, self.conv2 = (enlarging(channels, half, outputs) for outputs in (4, 1))

    def forward(self, seen: Tensor, scale: int) -> tuple[Tensor, Tensor]:
        """seen [B,11,H,W]: frames 3 + 3, mask 1, flow 4 -> flow [B,4,H,W] in pixels, mask [B,1,H,W]"""
        pictures, flow = resized_by(seen, 1 / scale).split([7, 4], dim=1)
        found = self.conv0(torch.cat((pictures, flow / scale), dim=1))
        for group in (self.convblock0, self.convblock1, self.convblock2, self.convblock3):
            found = found + group(found)
        return resized_by(self.conv1(found), scale) * scale, resized_by(self.conv2(found), scale)


def convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """A 3x3 convolution with PReLU."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.PReLU(outputs))


def enlarging(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Two transposed convolutions, each of which doubles the sides."""
    first, second = (nn.ConvTranspose2d(*ends, 4, stride=2, padding=1) for ends in ((inputs, hidden), (hidden, outputs)))
    return nn.Sequential(first, nn.PReLU(hidden), second)


def resized_by(maps: Tensor, scale: float) -> Tensor:
    """The maps with `scale` times their sides, bilinear and without antialiasing."""
    return F.interpolate(maps, scale_factor=scale, mode="bilinear", align_corners=False)


def swapped(flow: Tensor) -> Tensor:
    """The flow of the second frame before that of the first.  [B,4,H,W]"""
    return flow.roll(2, dims=1)


def warp(picture: Tensor, flow: Tensor) -> Tensor:
    """The picture sampled where the flow in pixels leads from each pixel; its border repeats.  [B,C,H,W], [B,2,H,W] -> [B,C,H,W]"""
    height, width = flow.shape[-2:]
    shares = rearrange(flow, "b n h w -> b h w n") * (2 / flow.new_tensor([width, height]))
    return F.grid_sample(picture, unit_grid(height, width, flow) + shares, padding_mode="border", align_corners=False)
