"""Eye positions of an aligned face: the pair of dark spots that is most likely a pair of eyes; robust to glasses and brows."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sonic.data.face_filter import FacePose, blur

DENSITY = 4  # samples per template pixel
HALF_WIDTH, TOP, BOTTOM = 8, -9, 0  # the part of the face that is searched, in template pixels
USUAL = (4.8, -4.1)  # expected position of the eye on the right of the picture; the left one mirrors it
SPREAD, TILT_SPREAD, WIDTH_SPREAD = 0.9, 0.1, 1.0
SHARE_OF_PRIOR = 0.12


def read_eyes(window: Tensor, pose: FacePose) -> Tensor:
    """Centres of both eyes in px of the window, the left one first.  window [H,W,3] in [0,1] -> [2,2] (x, y)"""
    y = (torch.arange((BOTTOM - TOP) * DENSITY) + 0.5) / DENSITY + TOP
    x = (torch.arange(2 * HALF_WIDTH * DENSITY) + 0.5) / DENSITY - HALF_WIDTH
    points = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
    spots = _dark_spots(window, pose, points)
    sides = [_near(points, spots, -1), _near(points, spots, 1)]
    (left, left_merit), (right, right_merit) = sides
    apart = right[None] - left[:, None]  # [left, right, 2]
    deviation = (torch.atan2(apart[..., 1], apart[..., 0]) / TILT_SPREAD) ** 2 + ((apart[..., 0] - 2 * USUAL[0]) / WIDTH_SPREAD) ** 2
    merit = left_merit[:, None] + right_merit[None] - SHARE_OF_PRIOR / 2 * deviation
    weight = torch.softmax(merit.flatten() / 0.04, dim=0).reshape(merit.shape)
    eyes = torch.stack([weight.sum(1) @ left, weight.sum(0) @ right])
    return eyes @ _rotation(pose) + torch.tensor([pose.x, pose.y])


def _rotation(pose: FacePose) -> Tensor:
    """The matrix that takes template coordinates (row vectors) to px from the template's middle."""
    cos, sin = math.cos(pose.angle) * pose.unit, math.sin(pose.angle) * pose.unit
    return torch.tensor([[cos, sin], [-sin, cos]])


def _dark_spots(window: Tensor, pose: FacePose, points: Tensor) -> Tensor:
    """How much darker than its surroundings each spot of the size of an iris is; 1 at the darkest.  -> [h,w]"""
    grey = window.mean(-1)[None, None]
    step = pose.unit / DENSITY
    grey = blur(grey, 0.5 * step) if step > 1 else grey
    rotated = points @ _rotation(pose) + torch.tensor([pose.x, pose.y])
    grid = 2 * rotated / torch.tensor([window.shape[1], window.shape[0]]) - 1
    dark = -torch.log(F.grid_sample(grey, grid[None], padding_mode="border", align_corners=False) + 0.05)
    spots = (blur(dark, 0.5 * DENSITY) - blur(dark, 1.6 * DENSITY))[0, 0]
    x, y = points.unbind(-1)
    inside = (y > -7.5) & (y < -1.5) & (x.abs() < HALF_WIDTH - 0.5)
    return spots / spots[inside].max().clamp(min=0.05)


def _near(points: Tensor, spots: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Candidate positions of the eye of one side, and the log posterior of each.  -> [n,2], [n]"""
    off = (((points - torch.tensor([side * USUAL[0], USUAL[1]])) / SPREAD) ** 2).sum(-1)
    possible = off < 6
    return points[possible], spots[possible] - SHARE_OF_PRIOR / 2 * off[possible]
