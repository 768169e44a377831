"""Closes the eyes of a photograph along the outlines of their lids, at its own resolution.  No networks."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sonic.geometry import pixels_around

CORNERS = (0, 8)  # of the 16 points of an outline: the lower lid lies between them, the upper one behind
CORNER = 0.12  # the lids meet outside the corners of the outline by this share of its width
STRETCHED = 0.25  # height of the skin above the eye that the lid pulls down, in widths of the eye
LASHES = 0.07  # height of the lid's edge that moves without being stretched, in widths of the eye
OVERLAP = 0.12  # a closed lid covers the lower one by this share of the opening


def close_eyes(picture: Tensor, outlines: np.ndarray, closed: float) -> Tensor:
    """The picture with the upper lids drawn down over the eyes: 0 = as they are, 1 = closed.

    picture [1,3,H,W]; outlines [n,16,2] in its px (x, y), as `Portrait.eyes`.
    """
    for outline in outlines:
        picture = _closed(picture, outline, closed)
    return picture


def _closed(picture: Tensor, outline: np.ndarray, closed: float) -> Tensor:
    """The picture with one eye closed.

    In coordinates along the line through the corners of the eye, u from 0 to 1, and v px below it, the edge of the upper lid moves
    down in each column. A column of skin above keeps its upper end, so it is stretched.
    """
    first, last = outline[list(CORNERS)]
    first, across = first + CORNER * (first - last), (1 + 2 * CORNER) * (last - first)
    width = float(np.hypot(*across))
    down = np.array([-across[1], across[0]]) / width
    u, v = (outline - first) @ across / width**2, (outline - first) @ down
    lower, upper = slice(1, CORNERS[1]), slice(CORNERS[1] + 1, None)
    if v[lower].mean() < v[upper].mean():  # the corners are in the other order
        down, v = -down, -v
    edges = [np.linalg.lstsq(_curves(u[lid]), v[lid], rcond=None)[0] for lid in (upper, lower)]

    middle = outline.mean(axis=0)
    reach = np.abs(outline - middle).max() + (STRETCHED + LASHES) * width
    columns, rows = (pixels_around(float(part), reach, size) for part, size in zip(middle, picture.shape[:1:-1], strict=True))
    ys, xs = np.mgrid[rows, columns] + 0.5
    points = np.stack([xs, ys], axis=-1)
    u, v = (points - first) @ across / width**2, (points - first) @ down
    top, bottom = (_curves(u.clip(0, 1)) @ edge for edge in edges)
    drop = closed * (1 + OVERLAP) * (bottom - top).clip(0)
    above = top + drop - v  # the lid's edge
    lashes, stretched = LASHES * width, STRETCHED * width
    skin = (above - lashes).clip(0, stretched + drop)
    moved = drop * (1 - skin / (stretched + drop))
    source = points - moved[..., None] * down
    grid = torch.from_numpy(2 * source / picture.shape[:1:-1] - 1).to(picture)
    lid = F.grid_sample(picture, grid[None], mode="bicubic", padding_mode="border", align_corners=False)
    cover = torch.from_numpy((above + 0.5).clip(0, 1) * (moved > 0)).to(picture)
    result = picture.clone()
    result[:, :, rows, columns] = torch.lerp(picture[:, :, rows, columns], lid, cover)
    return result


def _curves(u: np.ndarray) -> np.ndarray:
    """The curves whose sum is the edge of a lid, which begins and ends in the corners of the eye.  [...] -> [...,3]"""
    return (u * (1 - u))[..., None] * u[..., None] ** np.arange(3)
