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

from sonic.geometry import pixels_around, smoothstep
from sonic.types import Mouth, Portrait

PARTED = 0.1  # largest gap between the inner edges below which lips count as closed
SMALLEST_GAP = 1.5  # px
MARGIN, SHORT = 0.05, 0.25  # the mesh sees a gap too small: by MARGIN at either edge, and by a share SHORT of it at the lower one
AT_CORNER = 0.35  # distance from the corners of the mouth over which both grow from nothing
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
    """The portrait with its mouth closed, and what it showed between the lips as `inside`.

    It stays as it is when its lips are unknown or meet, or when no pixel shows what is between them.
    """
    if portrait.lips is None:
        return portrait
    mouth, outlines = portrait.mouth, _in_units(portrait.lips, portrait.mouth)
    if (outlines[1, :, 1] - outlines[0, :, 1]).max() < max(PARTED, SMALLEST_GAP / mouth.half_width):
        return portrait
    height, width = portrait.pixels.shape[:2]
    radius = REACH * math.hypot(1, 1) * mouth.half_width
    region = np.s_[pixels_around(mouth.y, radius, height), pixels_around(mouth.x, radius, width)]
    rows, columns = np.mgrid[region].reshape(2, -1)
    x, y = _in_units(np.stack([columns, rows], -1) + 0.5, mouth).astype(np.float32).T
    near = (np.abs(x) < CHEEKS[1]) & (np.abs(y) < REACH)
    x, y, rows, columns = x[near], y[near], rows[near], columns[near]
    edges = np.stack([_edge(outline, x) for outline in outlines])
    if not ((y > edges[0]) & (y < edges[1])).any():
        return portrait
    inside = np.dstack([portrait.pixels, np.zeros((height, width), np.uint8)])
    teeth_end = _edge(_darkest(portrait, region, outlines), x)
    inside[rows, columns] = _seen_inside(portrait.pixels[rows, columns], y, edges, teeth_end=teeth_end, half_width=mouth.half_width)

    down, up, line, crease = _motion(x, y, edges, corners=outlines[0, [0, -1], 0], chin=_chin(portrait))
    moved = (down != 0) | (up != 0) | (crease > 1e-3)
    x, y, down, up, line, crease = (values[moved] for values in (x, y, down, up, line, crease))
    side = np.clip((y - line) * mouth.half_width / 1.5 + 0.5, 0, 1)[:, None]  # of the line: 0 above, 1 below, over 1.5 px
    shown = (1 - side) * _sampled(portrait, region, x=x, y=y - down) + side * _sampled(portrait, region, x=x, y=y + up)
    closed = portrait.pixels.copy()
    closed[rows[moved], columns[moved]] = np.clip(shown * (1 - crease[:, None]), 0, 255).round().astype(np.uint8)
    return replace(portrait, pixels=closed, inside=inside)


def _seen_inside(colours: np.ndarray, y: np.ndarray, edges: np.ndarray, *, teeth_end: np.ndarray, half_width: float) -> np.ndarray:
    """What is kept of the pixels between the lips: their colours, which fade into a shade below the teeth and in the corners, and their
    opacity in 0..255.

    colours [n,3], y [n], edges of the lips [4,n], lower edge of the teeth [n] -> [n,4]
    """
    upper, lower = edges[:2]
    wide = smoothstep((lower - upper - WIDE_OPEN[0]) / (WIDE_OPEN[1] - WIDE_OPEN[0]))
    opacity = np.clip(np.minimum((y - upper) * half_width, 1 - (y - lower) / SHADE), 0, 1) * wide.max() * (lower > upper)
    shade = np.percentile(colours[(y > upper) & (y < lower)], 5, axis=0)
    below = smoothstep((y - np.minimum(teeth_end, lower - SHADE / 2)) / (SHADE / 2))
    shaded = 1 - wide * (1 - below)  # below the teeth, and in the corners of the mouth
    return np.hstack([colours + shaded[:, None] * (shade - colours), 255 * opacity[:, None]])


def _motion(x: np.ndarray, y: np.ndarray, edges: np.ndarray, *, corners: np.ndarray, chin: float) -> tuple[np.ndarray, ...]:
    """How the mouth closes at each pixel: how far what is seen there above the line where the lips meet has come down, and below it has
    come up; the height of that line, and the share by which it darkens the pixel.

    x, y [n], edges of the lips [4,n], corners of the mouth (x of the left and the right one) -> four [n]
    """
    upper, lower, upper_outer, lower_outer = edges
    open_here = smoothstep(np.minimum(x - corners[0], corners[1] - x) / AT_CORNER)
    upper, lower = upper - MARGIN * open_here, lower + (MARGIN + SHORT * (lower - upper)) * open_here
    line = upper + MEET * (lower - upper)
    above, below = np.maximum(line - y, 0), np.maximum(y - line, 0)
    fall, rise = ((way * ((x > corners[0]) & (x < corners[1]))) for way in (line - upper, lower - line))  # of the edges to the line

    down = fall * (1 - smoothstep((above - np.maximum(upper - upper_outer, THINNEST)) / ABOVE))
    open_jaw = np.clip((float((lower - upper).max()) - JAW_FROM) / (JAW_FULL - JAW_FROM), 0, 1)
    jaw = JAW * open_jaw * rise.max() * (1 - smoothstep((np.abs(x) - CHEEKS[0]) / (CHEEKS[1] - CHEEKS[0])))
    skin = smoothstep((below - np.maximum(lower_outer - lower, THINNEST)) / BELOW)  # 0 in the lower lip, 1 where only the jaw moves
    up = (rise * (1 - skin) + jaw * skin) * (1 - smoothstep((y - chin) / THROAT))
    crease = CREASE * np.exp(-(((y - line) / CREASE_HEIGHT) ** 2)) * open_here
    return down, up, line, crease


def _darkest(portrait: Portrait, region: tuple[slice, slice], outlines: np.ndarray) -> np.ndarray:
    """Where it is darkest above the lower lip, of which the mesh sometimes takes a strip for the gap.  -> [11,2] in mouth units"""
    x = np.linspace(outlines[0, :, 0].min(), outlines[0, :, 0].max(), 11)
    upper, lower = _edge(outlines[0], x), _edge(outlines[1], x)
    height = np.minimum(STRIP, (lower - upper) / 2)
    share = np.linspace(0, 1, 25)  # from the lower edge of the gap upwards
    y = lower - rearrange(share, "n -> n 1") * height
    tone = _sampled(portrait, region, x=np.broadcast_to(x, y.shape).ravel(), y=y.ravel()).sum(-1).reshape(y.shape)
    return np.stack([x, lower - median_filter(share[tone.argmin(0)], 5, mode="nearest") * height], -1)


def _chin(portrait: Portrait) -> float:
    """The chin's distance below the mouth: there the face box ends, which for a rotated face is as large but upright."""
    face, mouth = portrait.face, portrait.mouth
    middle = _in_units(np.array(face.middle), mouth)
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
