"""Mouth position of an aligned face: a lens shape fitted to pixels that are redder, darker or less coloured than the skin.

Coordinates are template pixels of the face filter (face.unit photo px each, origin in the template's middle, x along the eyes,
y down), in a small picture of the lower face.  The fit is maximum a posteriori: without evidence it returns the prior.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sonic.data.eyes import read_eyes
from sonic.data.face_filter import FacePose, blur
from sonic.types import Mouth

DENSITY = 6  # samples per template pixel
LEFT, RIGHT, TOP, BOTTOM = -8, 8, 0, 12  # the part of the face that is searched
#                     x    y    half width, upper and lower lip's height, tilt, sag of the slit
USUAL = torch.tensor([0.0, 5.4, 4.0, 1.0, 1.7, 0.0, 0.5])
SPREAD = torch.tensor([0.8, 0.55, 0.45, 0.45, 0.55, 0.06, 0.5])
TILT = 5
SHARE_OF_PRIOR = 0.035
SHARE_OF_SLIT = 0.5
SHARE_OF_EYES = 0.8  # the mouth is expected to tilt with the line of the eyes, but a little less
FULLNESS = 0.96  # lips are fuller than a lens, so the fitted one reaches a little beyond the corners
INDIFFERENT = 0.32  # mouthness at which a pixel is evidence neither for nor against the mouth


@dataclass(frozen=True)
class Evidence:
    """Evidence maps [h,w] in 0..1: `mouthness` of every pixel, and `slit`, thin dark red lines across the face."""

    mouthness: Tensor
    slit: Tensor


def read_mouth(window: Tensor, pose: FacePose) -> Mouth:
    """Find the mouth of a face of known pose, in px of the window.  window [H,W,3] in [0,1]"""
    (left, right), turned = read_eyes(window, pose), USUAL.clone()
    turned[TILT] = SHARE_OF_EYES * (math.atan2(right[1] - left[1], right[0] - left[0]) - pose.angle)
    shape = fit_lens(gather(lower_face(window, pose)), turned)
    x, y, half_width, upper, lower, tilt, sag = shape.tolist()
    middle = 0.3 * sag + 0.7 * (0.42 * (upper + lower) - upper)  # the lower lip is the thicker one
    x, y = x - middle * math.sin(tilt), y + middle * math.cos(tilt)
    cos, sin = math.cos(pose.angle) * pose.unit, math.sin(pose.angle) * pose.unit
    half_width *= FULLNESS * pose.unit
    return Mouth(pose.x + cos * x - sin * y, pose.y + sin * x + cos * y, half_width, pose.angle + tilt)


def positions() -> Tensor:
    """Template coordinates of the patch's pixels.  -> [h,w,2] (x, y)"""
    y = (torch.arange((BOTTOM - TOP) * DENSITY) + 0.5) / DENSITY + TOP
    x = (torch.arange((RIGHT - LEFT) * DENSITY) + 0.5) / DENSITY + LEFT
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)


def lower_face(window: Tensor, pose: FacePose) -> Tensor:
    """Sample the lower face upright, at DENSITY pixels per template pixel.  -> [3,h,w]"""
    picture = window.permute(2, 0, 1)[None]
    step = pose.unit / DENSITY
    picture = blur(picture, 0.5 * step) if step > 1 else picture
    cos, sin = math.cos(pose.angle) * pose.unit, math.sin(pose.angle) * pose.unit
    points = positions() @ torch.tensor([[cos, sin], [-sin, cos]]) + torch.tensor([pose.x, pose.y])
    grid = 2 * points / torch.tensor([window.shape[1], window.shape[0]]) - 1
    return F.grid_sample(picture, grid[None], mode="bicubic", padding_mode="border", align_corners=False)[0].clamp(0, 1)


def gather(patch: Tensor) -> Evidence:
    """Evidence for the mouth.  patch [3,h,w] in [0,1]

    log(red / green) does not depend on shading; darkness shows the slit in grey pictures too; pixels less red than skin may be
    teeth and count half.
    """
    brightness = patch.mean(0)
    typical = float(brightness.median())
    redness = torch.log((patch[0] + 0.12 * typical + 0.02) / (patch[1] + 0.12 * typical + 0.02))
    red, dark = _beside_skin(redness), _beside_skin(-torch.log(brightness + 0.15 * typical + 0.01))
    seen = _face_oval().float()
    teeth = INDIFFERENT * torch.tanh((-red).clamp(min=0) / 4)
    mouthness = 1 - (1 - _saturate(red)) * (1 - _saturate(dark)) * (1 - teeth)
    line = blur((red.clamp(-4, 20) + dark.clamp(-4, 20))[None, None], 0.25 * DENSITY)[0, 0]
    above, below = torch.roll(line, int(0.9 * DENSITY), 0), torch.roll(line, -int(0.9 * DENSITY), 0)
    ridge = line - 0.5 * torch.maximum(above, below) - 0.25 * (above + below)
    return Evidence(mouthness * seen, _saturate(ridge) * seen)


def fit_lens(evidence: Evidence, usual: Tensor = USUAL, *, steps: int = 60) -> Tensor:
    """The most probable lens: gradient ascent from the best eight of a grid of starts.  -> [7] in the order of USUAL"""
    starts = torch.cartesian_prod(
        torch.arange(-2, 2.1, 0.5), torch.arange(4.2, 7.0, 0.35), torch.tensor([3.4, 4.1, 4.8]), torch.tensor([0.1, 0.8])
    )
    shapes = usual.repeat(len(starts), 1)
    shapes[:, [0, 1, 2, 6]] = starts
    with torch.no_grad():
        merit = torch.cat([_merit(part, evidence, usual, softness=0.3) for part in shapes.split(64)])
    best = shapes[merit.topk(8).indices].clone().requires_grad_(True)
    optimizer = torch.optim.Adam([best])
    with torch.enable_grad():
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 0.1 * (1 - 0.8 * step / steps)
            optimizer.zero_grad()
            (-_merit(best, evidence, usual, softness=0.3 * (1 - step / steps) + 0.1).sum()).backward()
            optimizer.step()
    with torch.no_grad():
        return best[_merit(best, evidence, usual, softness=0.12).argmax()].detach()


def _merit(shapes: Tensor, evidence: Evidence, usual: Tensor, *, softness: float) -> Tensor:
    """Log posterior of lens shapes: evidence inside the lens and along its slit, plus the prior.  shapes [n,7] -> [n]"""
    x, y, half_width, upper, lower, tilt, _ = (column[:, None, None] for column in shapes.unbind(1))
    here = positions()
    right, down = here[..., 0] - x, here[..., 1] - y
    along, across = torch.cos(tilt) * right + torch.sin(tilt) * down, torch.cos(tilt) * down - torch.sin(tilt) * right
    room = 1 - (along / half_width) ** 2
    inside = torch.sigmoid((across + upper * room) / softness) * torch.sigmoid((lower * room - across) / softness)
    area = (inside * (evidence.mouthness - INDIFFERENT)).sum((1, 2)) / DENSITY**2 / 14
    slit = (_sample(evidence.slit, _slit(shapes)) - 0.25).mean(1) * shapes[:, 2] / USUAL[2]
    prior = -0.5 * (((shapes - usual) / SPREAD) ** 2).sum(1)
    return area + SHARE_OF_SLIT * slit + SHARE_OF_PRIOR * prior


def _slit(shapes: Tensor, points: int = 33) -> Tensor:
    """Points of the parabola between the corners.  [n,7] -> [n,points,2]"""
    x, y, half_width, _, _, tilt, sag = (column[:, None] for column in shapes.unbind(1))
    share = torch.linspace(-1, 1, points)
    along, across = share * half_width, sag * (1 - share**2)
    return torch.stack([x + torch.cos(tilt) * along - torch.sin(tilt) * across, y + torch.sin(tilt) * along + torch.cos(tilt) * across], -1)


def _sample(field: Tensor, points: Tensor) -> Tensor:
    low, extent = torch.tensor([LEFT, TOP]), torch.tensor([RIGHT - LEFT, BOTTOM - TOP])
    return F.grid_sample(field[None, None], (2 * (points - low) / extent - 1)[None], align_corners=False)[0, 0]


def _face_oval() -> Tensor:
    x, y = positions().unbind(-1)
    return (x / 8.5) ** 2 + ((y - 3) / 8.5) ** 2 < 1


def _mouth_oval() -> Tensor:
    x, y = positions().unbind(-1)
    return (x / 5.5) ** 2 + ((y - 6) / 2.6) ** 2 < 1


def _beside_skin(field: Tensor, rounds: int = 8) -> Tensor:
    """A map minus its smooth trend over the lower face (a robust quadratic fit), in units of the skin's own variation."""
    x, y = positions().unbind(-1)
    x, y = x / 8, (y - 6) / 6
    basis = torch.stack([torch.ones_like(x), x, y, x * x, y * y, x * y], dim=-1)
    face, mouth = _face_oval() & (positions()[..., 1] > 2.2), _mouth_oval()
    rows, values, trust = basis[face], field[face], torch.where(mouth[face], 0.15, 1.0)
    weight = trust
    for _ in range(rounds):
        root = weight.sqrt()[:, None]
        course = torch.linalg.lstsq(rows * root, values[:, None] * root).solution[:, 0]
        error = values - rows @ course
        typical = 1.48 * error.abs().median() + 1e-4
        weight = trust / (1 + (error / (1.5 * typical)) ** 2)
    rest = field - basis @ course
    return rest / (1.48 * rest[face & ~mouth].abs().median() + 0.01)


def _saturate(field: Tensor) -> Tensor:
    """Map the deviation from the skin to 0..1, relative to the largest deviations around the mouth."""
    most = torch.quantile(field[_mouth_oval()], 0.93)
    return torch.tanh(field.clamp(min=0) / (0.6 * most).clamp(min=4.0))
