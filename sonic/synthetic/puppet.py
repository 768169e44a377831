"""Analytic animation of a still picture by visemes and head pose, which gives exact training targets.

The preview model is trained on and evaluated against it; inference never uses it.  All lengths are in mouth units: 1.0 is half
the width of the mouth, the origin is the middle of the mouth, y points down.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from sonic.geometry import NECK, smoothstep
from sonic.types import MotionLayers

OPENING = 0.8  # displacement of the lower lip, in mouth units, when the viseme's opening is 1
JAW = 0.62  # displacement of the chin as a share of the lip's
BELOW_LINE = 0.65  # share of a gap between the lips that lies below the line where they meet
REVEALED = 0.05  # lips of the still picture further apart than this show its own teeth


@dataclass(frozen=True)
class MouthShape:
    """Position and shape of the lips in a still picture, and the colours of the mouth's interior.

    `unit` half the mouth's width in px, `x, y` its middle in px, `roll` in radians, `curve` how far the middle of the lip line
    is below the corners, `gap` the height of the visible gap between the lips, `chin` the distance to the chin (all three in
    mouth units), `eyes` ((x, y, half width, half height) per eye, px in the unrotated frame).
    """

    x: float
    y: float
    unit: float
    roll: float = 0.0
    curve: float = 0.0
    gap: float = 0.0
    chin: float = 1.8
    gain: float = 1.0
    eyes: tuple[tuple[float, float, float, float], ...] = ()
    inside: dict[str, tuple[float, ...]] = field(default_factory=dict)

    def scaled(self, share: float) -> MouthShape:
        """The mouth after the picture is resized by that factor."""
        eyes = tuple(tuple(share * number for number in eye) for eye in self.eyes)
        return replace(self, x=share * self.x, y=share * self.y, unit=share * self.unit, eyes=eyes)


def lip_displacement(shape: MouthShape, visemes: Tensor) -> Tensor:
    """Displacement of the lower lip from rest, in mouth units.  visemes [F,5] -> [F]

    Zero in silence: a mouth that is open in the picture stays open, and closes only for m, b, p.
    """
    opened, press = visemes[:, 0], visemes[:, 2].clamp(0, 1)
    room = 1 - 0.4 * min(shape.gap / OPENING, 1.0)
    return shape.gain * OPENING * room * opened.clamp(0, 1.2) - 0.9 * shape.gap * press


def move(
    shape: MouthShape, visemes: Tensor, pose: Tensor | None = None, *, resolution: int, paint: Callable[..., Tensor] | None = None
) -> MotionLayers:
    """Motion of a picture of that resolution.  visemes [F,5], pose [F,4] or None

    Visemes: opening, width (-1 round .. +1 spread), press, teeth, tongue.  Pose: roll in radians, shift x and y in picture
    widths, blink 0..1.  `paint` renders the mouth's inside: `sketched` (the default) or `lit`.
    """
    ys, xs = torch.meshgrid(torch.arange(resolution) + 0.5, torch.arange(resolution) + 0.5, indexing="ij")
    if pose is None:
        head_x, head_y = (axis.expand(visemes.shape[0], -1, -1) for axis in (xs, ys))
    else:
        head_x, head_y = _move_head(xs, ys, shape=shape, pose=pose)
    source_x, source_y, opacity, interior = _speak(head_x, head_y, shape=shape, visemes=visemes, paint=paint or sketched)
    if pose is not None and shape.eyes:
        source_y = _blink(source_x, source_y, shape=shape, blink=pose[:, 3])
    flow = torch.stack([source_x - xs, source_y - ys], 1) / resolution
    return MotionLayers(flow, opacity.unsqueeze(1), interior)


def apply(picture: Tensor, motion: MotionLayers) -> Tensor:
    """Render a picture with the motion applied.  [3,R,R] in [0,1] -> [F,3,R,R] in [0,1]"""
    return torch.lerp(warped(picture, motion.flow), motion.interior, motion.opacity)


def warped(picture: Tensor, flow: Tensor) -> Tensor:
    """Displace the pixels of a picture.  [3,R,R], flow [F,2,R,R] -> [F,3,R,R]"""
    centres = (torch.arange(picture.shape[-1]) + 0.5) / picture.shape[-1]
    points = torch.stack(torch.meshgrid(centres, centres, indexing="xy"))
    grid = rearrange(points + flow, "f c h w -> f h w c") * 2 - 1
    return F.grid_sample(picture.expand(len(flow), -1, -1, -1), grid, padding_mode="border", align_corners=False)


def _column(values: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1)


def _move_head(xs: Tensor, ys: Tensor, *, shape: MouthShape, pose: Tensor) -> tuple[Tensor, Tensor]:
    """Source coordinates of output pixels for a head that rotates about the neck; the picture's border does not move."""
    resolution = xs.shape[-1]
    roll, shift_x, shift_y = (_column(pose[:, k]) for k in range(3))
    pivot_x, pivot_y = shape.x, shape.y + NECK * shape.unit
    dx, dy = xs - pivot_x - shift_x * resolution, ys - pivot_y - shift_y * resolution
    moved_x = pivot_x + dx * roll.cos() + dy * roll.sin()
    moved_y = pivot_y - dx * roll.sin() + dy * roll.cos()
    edge = torch.minimum(torch.minimum(xs, resolution - xs), torch.minimum(ys, resolution - ys))
    held = smoothstep(edge / (0.16 * resolution))
    return xs + (moved_x - xs) * held, ys + (moved_y - ys) * held


def _blink(source_x: Tensor, source_y: Tensor, *, shape: MouthShape, blink: Tensor) -> Tensor:
    """Source y coordinates that pull the skin above each eye down over it."""
    closed = _column(blink.clamp(0, 1))
    for x, y, half_width, half_height in shape.eyes:
        lens = 1.3 * half_height * (1 - ((source_x - x) / (1.15 * half_width)) ** 2).clamp(min=0).sqrt()
        lid = y - lens + 2 * lens * closed
        under = (source_y > y - lens) & (source_y < lid) & (closed > 0)
        source_y = torch.where(under, y - lens - 0.35 * (lid - source_y), source_y)
    return source_y


def _speak(
    px: Tensor, py: Tensor, *, shape: MouthShape, visemes: Tensor, paint: Callable[..., Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Source x and y, opacity and colour of the mouth's interior for output pixels px, py [F,R,R]."""
    cos, sin = torch.tensor(shape.roll).cos(), torch.tensor(shape.roll).sin()
    dx, dy = (px - shape.x) / shape.unit, (py - shape.y) / shape.unit
    x, y = dx * cos + dy * sin, dy * cos - dx * sin
    delta, width, press = _column(lip_displacement(shape, visemes)), _column(visemes[:, 1]), _column(visemes[:, 2].clamp(0, 1))
    stretch = 1 + torch.where(width > 0, 0.16, 0.30) * width
    near = torch.exp(-((x / 1.9) ** 4) - (y / 1.7) ** 4)
    x = x / (1 + (stretch - 1) * near)

    arch = (1 - (x / 0.97) ** 2).clamp(min=0) ** 0.7
    line = shape.curve * (1 - x * x).clamp(min=-1)
    upper, lower = line - (1 - BELOW_LINE) * shape.gap * arch, line + BELOW_LINE * shape.gap * arch
    lift = (0.12 * delta.clamp(min=0) + 0.05 * _column(visemes[:, 3])) * (shape.gap < REVEALED) * (delta > 0.02)
    lift = lift - (1 - BELOW_LINE) * (-delta).clamp(min=0)  # lips that close over a smile meet in the middle
    delta = torch.where(delta > 0, delta, BELOW_LINE * delta)
    upper_now, lower_now = upper - lift * arch, lower + delta * arch

    below = smoothstep((y - lower_now) / max(shape.chin, 0.5))
    tail = 1 - smoothstep((y - shape.chin - JAW * delta.clamp(min=0)) / 1.3)
    cheeks = torch.exp(-((x / 2.1) ** 4))
    drop = delta * (arch * (1 - below) + JAW * cheeks * below) * tail
    rise = lift * arch * torch.exp(-(((y - upper_now) / 0.5) ** 2))
    own = (shape.gap >= REVEALED) & (y > upper_now) & (y < lower_now)
    seen = torch.where(y >= lower_now, y - drop, torch.where(own, torch.minimum(y, lower), y + rise))
    squeeze = 0.3 * press * (shape.gap < REVEALED) * torch.exp(-(x**4) - ((y - line) / 0.4) ** 2)
    seen = seen + squeeze * (y - line)

    top = lower if shape.gap >= REVEALED else upper_now
    room = (lower_now - top).clamp(min=0)
    opacity = (torch.minimum(y - top, lower_now - y) * shape.unit + 0.5).clamp(0, 1) * (room * shape.unit * 0.8).clamp(0, 1)
    opacity = opacity * (arch > 0)
    interior = paint(x, y, room=(top, lower_now), shape=shape, visemes=visemes)
    back_x, back_y = x * cos - seen * sin, x * sin + seen * cos
    return back_x * shape.unit + shape.x, back_y * shape.unit + shape.y, opacity, interior


def sketched(x: Tensor, y: Tensor, *, room: tuple[Tensor, Tensor], shape: MouthShape, visemes: Tensor) -> Tensor:
    """Throat, tongue and, unless the picture shows its own, upper teeth, as the latents describe them: teeth that speech hides are
    translucent.  x, y and the edges of the lips `room` in mouth units -> [F,3,R,R] in [0,1]"""
    look, (top, bottom) = shape.inside, room
    colour = partial(_colour, look)
    teeth, tongue = _column(visemes[:, 3].clamp(0, 1)), _column(visemes[:, 4].clamp(0, 1))
    depth = ((y - top) / (bottom - top).clamp(min=0.02)).clamp(0, 1)
    throat = colour("throat") * (1.3 - 0.6 * torch.sin(depth * torch.pi)).unsqueeze(1)
    height = (bottom - top).clamp(min=0.05)
    lobe = 1 - (x / 0.62) ** 2 - ((y - bottom) / (0.12 + 0.45 * height * (0.4 + 0.6 * tongue))) ** 2
    painted = torch.lerp(throat, colour("tongue") * (1.05 - 0.3 * depth).unsqueeze(1), (lobe * 3).clamp(0, 1).unsqueeze(1) * 0.85)
    if shape.gap >= REVEALED:
        return painted
    height = look["teeth_height"][0] * (0.45 + 0.55 * teeth)
    row = ((top + height * (1 - 0.5 * x * x) - y) * shape.unit + 0.5).clamp(0, 1) * ((0.82 - x.abs()) * 6).clamp(0, 1)
    enamel = colour("teeth") * (1 - 0.3 * x * x).unsqueeze(1) * (0.8 + 0.25 * ((y - top) / height).clamp(0, 1)).unsqueeze(1)
    return torch.lerp(painted, enamel, (row * (0.25 + 0.75 * teeth)).unsqueeze(1))


def lit(x: Tensor, y: Tensor, *, room: tuple[Tensor, Tensor], shape: MouthShape, visemes: Tensor) -> Tensor:
    """The mouth's inside as a camera sees it, for the decoder to learn: opaque teeth that hang from the upper lip, in its shade at the
    top and darker towards the corners, and a tongue that shines in front of a dark throat.  As `sketched`."""
    look, (top, bottom) = shape.inside, room
    teeth, tongue = _column(visemes[:, 3].clamp(0, 1)), _column(visemes[:, 4].clamp(0, 1))
    height, depth = (bottom - top).clamp(min=0.05), ((y - top) / (bottom - top).clamp(min=0.02)).clamp(0, 1)
    painted = _colour(look, "throat") * (1.2 - 0.7 * torch.sin(depth * torch.pi)).unsqueeze(1)
    lobe = 1 - (x / 0.7) ** 2 - ((y - bottom) / (0.15 + 0.4 * height * (0.4 + 0.6 * tongue))) ** 2
    shine = (1 - 0.4 * x * x) * (0.75 + 0.35 * lobe.clamp(0, 1))
    painted = torch.lerp(painted, _colour(look, "tongue") * shine.unsqueeze(1), (lobe * 4).clamp(0, 1).unsqueeze(1))
    if shape.gap >= REVEALED:
        return painted
    hang = look["teeth_height"][0] * (0.4 + 0.6 * teeth) * (1 - 0.4 * x * x)
    seams = 1 - 0.1 * torch.exp(-((((x / 0.22) % 1 - 0.5) / 0.12) ** 2))
    shade = (0.75 + 0.25 * smoothstep((y - top) / 0.1)) * (1 - 0.35 * x * x) * seams
    row = ((top + hang - y) * shape.unit + 0.5).clamp(0, 1) * ((0.88 - x.abs()) * 6).clamp(0, 1)
    return torch.lerp(painted, _colour(look, "teeth") * shade.unsqueeze(1), row.unsqueeze(1))


def _colour(look: dict[str, tuple[float, ...]], name: str) -> Tensor:
    return torch.tensor(look[name], dtype=torch.float32).reshape(1, 3, 1, 1)
