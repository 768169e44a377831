"""Closes the mouth of a photograph whose lips are parted, so that every portrait begins to speak from a closed mouth.

The lips are moved along the mouth's vertical until their inner edges meet; the skin around them and, for a mouth wide open, the jaw
follow.  What the photograph shows between the lips, its own teeth above all, is kept, to be seen again where the mouth opens there.
Lengths are in mouth units: 1 is half the mouth's width, the origin is the middle of the mouth, x points right along the mouth, y down.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from einops import rearrange
from scipy.interpolate import PchipInterpolator
from scipy.ndimage import median_filter
from torch.nn import functional as F

from sonic.geometry import pixels_around
from sonic.types import Mouth, Portrait

PARTED = 0.1  # largest gap between the inner edges below which lips count as closed
MARGIN, SHORT, AT_CORNER = 0.05, 0.25, 0.35  # the mesh sees a gap so much too small at either edge, and at the lower one by this share
# of the gap besides; less so this close to the corners
MEET = 0.3  # where the lips meet: at the upper edge of the gap (0), or at its lower one (1)
THINNEST = 0.15  # a lip moves as a whole over at least this height
ABOVE, BELOW = 0.6, 1.0  # heights over which the skin above the upper lip and that below the lower lip give way
JAW, JAW_FROM, JAW_FULL = 0.62, 0.35, 0.75  # share of the lip's way that the chin moves, and gaps at which it begins to and does so fully
CHEEKS = (1.0, 2.6)  # distance to the side at which the jaw's motion begins to fade, and where it ends
CHIN = (1.2, 3.0)  # distances of the chin below the mouth that are believed
THROAT = 0.9  # height below the chin over which its motion fades
CREASE, CREASE_HEIGHT = 0.3, 0.05  # the line where the lips meet is darker by this share, over this height
WIDE_OPEN = (0.14, 0.26)  # gaps at which what is between the lips begins to be kept, and is kept wholly; the mesh takes lips for less
SHADE = 0.2  # height over which the shade below the photograph's own teeth, which is as dark as what is darkest there, fades
STRIP = 0.3  # greatest height of a strip of the lower lip that is seen above the lower edge of the gap
REACH = 3.8  # no pixel further above or below the mouth changes


def close_mouth(portrait: Portrait) -> Portrait:
    """The portrait with its mouth closed, and what it showed between the lips as `inside`; itself when its lips are unknown or meet."""
    if portrait.lips is None:
        return portrait
    mouth, edges = portrait.mouth, _in_units(portrait.lips, portrait.mouth)
    if (edges[1, :, 1] - edges[0, :, 1]).max() < PARTED:
        return portrait
    height, width = portrait.pixels.shape[:2]
    radius = REACH * math.hypot(1, 1) * mouth.half_width
    region = np.s_[pixels_around(mouth.y, radius, height), pixels_around(mouth.x, radius, width)]
    rows, columns = np.mgrid[region].reshape(2, -1)
    x, y = _in_units(np.stack([columns, rows], -1) + 0.5, mouth).astype(np.float32).T
    near = (np.abs(x) < CHEEKS[1]) & (np.abs(y) < REACH)
    x, y, rows, columns = x[near], y[near], rows[near], columns[near]
    upper, lower, upper_outer, lower_outer = (_edge(edge, x) for edge in edges)
    corners, chin = edges[0, [0, -1], 0], _chin(portrait)

    teeth_end = _edge(_darkest(portrait, region, edges), x)
    wide = _smoothstep((lower - upper - WIDE_OPEN[0]) / (WIDE_OPEN[1] - WIDE_OPEN[0]))
    opacity = np.clip(np.minimum((y - upper) * mouth.half_width, 1 - (y - lower) / SHADE), 0, 1) * wide
    own = portrait.pixels[rows, columns]
    shade = np.percentile(own[(y > upper) & (y < lower)], 5, axis=0)
    below = _smoothstep((y - np.minimum(teeth_end, lower - SHADE / 2)) / (SHADE / 2))[:, None]
    inside = np.dstack([portrait.pixels, np.zeros((height, width), np.uint8)])
    inside[rows, columns] = np.hstack([own + below * (shade - own), 255 * opacity[:, None]])

    open_here = _smoothstep(np.minimum(x - corners[0], corners[1] - x) / AT_CORNER)
    upper, lower = upper - MARGIN * open_here, lower + (MARGIN + SHORT * (lower - upper)) * open_here
    line = upper + MEET * (lower - upper)
    rise, drop = ((edge * ((x > corners[0]) & (x < corners[1]))) for edge in (line - upper, lower - line))
    above, below = np.maximum(line - y, 0), np.maximum(y - line, 0)
    up = rise * (1 - _smoothstep((above - np.maximum(upper - upper_outer, THINNEST)) / ABOVE))
    open_jaw = np.clip((float((lower - upper).max()) - JAW_FROM) / (JAW_FULL - JAW_FROM), 0, 1)
    jaw = JAW * open_jaw * drop.max() * (1 - _smoothstep((np.abs(x) - CHEEKS[0]) / (CHEEKS[1] - CHEEKS[0])))
    skin = _smoothstep((below - np.maximum(lower_outer - lower, THINNEST)) / BELOW)
    down = (drop * (1 - skin) + jaw * skin) * (1 - _smoothstep((y - chin) / THROAT))
    crease = CREASE * np.exp(-(((y - line) / CREASE_HEIGHT) ** 2)) * open_here

    moved = (up != 0) | (down != 0) | (crease > 1e-3)
    x, y, up, down, line, crease = (values[moved] for values in (x, y, up, down, line, crease))
    side = np.clip((y - line) * mouth.half_width / 1.5 + 0.5, 0, 1)[:, None]  # of the line: 0 above, 1 below, over 1.5 px
    shown = (1 - side) * _sampled(portrait, region, x=x, y=y - up) + side * _sampled(portrait, region, x=x, y=y + down)
    closed = portrait.pixels.copy()
    closed[rows[moved], columns[moved]] = np.clip(shown * (1 - crease[:, None]), 0, 255).round().astype(np.uint8)
    return replace(portrait, pixels=closed, inside=inside)


def _darkest(portrait: Portrait, region: tuple[slice, slice], edges: np.ndarray) -> np.ndarray:
    """Where it is darkest above the lower lip, of which the mesh sometimes takes a strip for the gap.  -> [11,2] in mouth units"""
    x = np.linspace(edges[0, :, 0].min(), edges[0, :, 0].max(), 11)
    upper, lower = _edge(edges[0], x), _edge(edges[1], x)
    height = np.minimum(STRIP, (lower - upper) / 2)
    share = np.linspace(0, 1, 25)  # from the lower edge of the gap upwards
    y = lower - rearrange(share, "n -> n 1") * height
    tone = _sampled(portrait, region, x=np.broadcast_to(x, y.shape).ravel(), y=y.ravel()).sum(-1).reshape(y.shape)
    return np.stack([x, lower - median_filter(share[tone.argmin(0)], 5, mode="nearest") * height], -1)


def _chin(portrait: Portrait) -> float:
    """The chin's distance below the mouth: there the face box ends, which for a rotated face is as large but upright."""
    face, mouth = portrait.face, portrait.mouth
    middle = _in_units(np.array([face.x + face.width / 2, face.y + face.height / 2]), mouth)
    return float(np.clip(middle[1] + (face.width + face.height) / 4 / mouth.half_width, *CHIN))


def _in_units(points: np.ndarray, mouth: Mouth) -> np.ndarray:
    """Points in px of the photograph, in mouth units.  [...,2] -> [...,2]"""
    cos, sin = math.cos(mouth.angle), math.sin(mouth.angle)
    return (points - np.array([mouth.x, mouth.y])) @ np.array([[cos, -sin], [sin, cos]]) / mouth.half_width


def _sampled(portrait: Portrait, region: tuple[slice, slice], *, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The colours of a region of the photograph at points in mouth units.  x, y [n] -> [n,3]"""
    mouth, picture = portrait.mouth, torch.from_numpy(portrait.pixels[region].copy()).float()
    cos, sin = math.cos(mouth.angle), math.sin(mouth.angle)
    corner = np.array([mouth.x - region[1].start, mouth.y - region[0].start])
    points = mouth.half_width * np.stack([x * cos - y * sin, x * sin + y * cos], -1) + corner
    grid = torch.from_numpy(2 * points / picture.shape[1::-1] - 1).float()
    picture = rearrange(picture, "h w c -> 1 c h w")
    sampled = F.grid_sample(picture, rearrange(grid, "n xy -> 1 n 1 xy"), mode="bicubic", padding_mode="border", align_corners=False)
    return rearrange(sampled, "1 c n 1 -> n c").numpy()


def _edge(points: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Height of a lip's edge at every x; beyond its ends that of the nearest end.  points [11,2] -> as x"""
    order = np.argsort(points[:, 0], kind="stable")
    points = points[order][np.concatenate([[True], np.diff(points[order, 0]) > 1e-6])]
    finely = np.linspace(points[0, 0], points[-1, 0], 1024)
    return np.interp(x, finely, PchipInterpolator(*points.T)(finely)).astype(np.float32)


def _smoothstep(t: np.ndarray) -> np.ndarray:
    t = np.clip(t, 0, 1)
    return t * t * (3 - 2 * t)
