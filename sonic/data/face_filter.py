"""Face alignment by one linear filter over gradient channels: a template of an upright face, 25 pixels high.

The filter is fitted to the hundred small faces that scikit-image bundles, rotated, shifted, resized and relit in many ways; its
response is near 1 on a face of that size and roll and near 0 beside it.  `sonic/assets/face_filter.npz` was written by
`fit()`; its card gives the command.
"""

from __future__ import annotations

import importlib.resources
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from skimage import data
from torch import Tensor

ROWS, COLUMNS = 25, 22  # of the template; the bundled faces are 25 wide, but their middle is 1.5 columns left of the picture's
ASSET = "face_filter.npz"
LOUDNESS = 10.0  # norm that every window of channels is scaled to before filtering
SHARE_OF_PRIOR = 0.1  # weight of the log prior beside the response: one standard deviation costs half of this


@dataclass(frozen=True)
class FaceFilter:
    """Weights [C,ROWS,COLUMNS], zero outside the face oval, and an offset that is added to every response."""

    weights: Tensor
    offset: float


@dataclass(frozen=True)
class FacePose:
    """Pose of the template in a picture: middle x, y in px, `unit` px per template pixel, roll in radians, response (about 1 on a
    face)."""

    x: float
    y: float
    unit: float
    angle: float
    response: float


@dataclass(frozen=True)
class Guess:
    """Prior of a face pose: middle, unit and roll as in FacePose, and their standard deviations (px; logarithm; radians)."""

    x: float
    y: float
    unit: float
    shift: float
    roll: float = 0.0
    log_unit: float = 0.15
    angle: float = 0.17


@dataclass(frozen=True)
class Move:
    """Augmentation of a template: roll in radians, sizes as factors, the rest in template pixels."""

    roll: float = 0.0
    size: float = 1.0
    right: float = 0.0
    down: float = 0.0
    yaw: float = 0.0
    width: float = 1.0


def template_grid() -> Tensor:
    """Positions of the template's pixels relative to its middle.  -> [ROWS,COLUMNS,2] (x, y)"""
    y, x = torch.meshgrid(torch.arange(ROWS) + 0.5 - ROWS / 2, torch.arange(COLUMNS) + 0.5 - COLUMNS / 2, indexing="ij")
    return torch.stack([x, y], dim=-1)


def oval() -> Tensor:
    """Mask of the face: 1 inside, 0 in the corners, which show hair and background.  -> [ROWS,COLUMNS]"""
    x, y = template_grid().unbind(-1)
    return ((x / 9.0) ** 2 + ((y - 1.0) / 10.5) ** 2 < 1).float()


def channels(grey: Tensor) -> Tensor:
    """Input channels of the filter: positive and negative gradients and brightness, locally normalised.  [B,1,H,W] -> [B,5,H,W]"""
    wide, high = F.pad(grey, (1, 1, 0, 0), mode="replicate"), F.pad(grey, (0, 0, 1, 1), mode="replicate")
    right, down = (wide[..., 2:] - wide[..., :-2]) / 2, (high[..., 2:, :] - high[..., :-2, :]) / 2
    strength = blur(right**2 + down**2, 3.0).sqrt() + 0.02
    edges = torch.cat([right, -right, down, -down], dim=1).clamp(min=0) / strength
    detail = grey - blur(grey, 3.0)
    return torch.cat([blur(edges, 0.6), 0.5 * detail / (blur(detail**2, 4.0).sqrt() + 0.03)], dim=1)


def blur(picture: Tensor, sigma: float) -> Tensor:
    """Gaussian blur with the border repeated.  [B,C,H,W]"""
    if sigma < 0.1:
        return picture
    radius = math.ceil(3 * sigma)
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2).to(picture)
    taps = taps / taps.sum()
    count = picture.shape[1]
    padded = F.pad(picture, (radius, radius, radius, radius), mode="replicate")
    columns = F.conv2d(padded, taps.reshape(1, 1, -1, 1).expand(count, 1, -1, 1), groups=count)
    return F.conv2d(columns, taps.reshape(1, 1, 1, -1).expand(count, 1, 1, -1), groups=count)


@lru_cache(maxsize=1)
def load() -> FaceFilter:
    """Load the bundled filter."""
    with (importlib.resources.files("sonic.assets") / ASSET).open("rb") as file, np.load(file) as saved:
        return FaceFilter(torch.from_numpy(saved["weights"]).float(), float(saved["offset"]))


def align(grey: Tensor, guess: Guess) -> FacePose:
    """The most probable pose of the face near a guess: a coarse search, then a fine one.  grey [H,W] in [0,1]"""
    rotations = guess.roll + torch.arange(-24, 25, 6) * (math.pi / 180)
    sizes = guess.unit * torch.exp(torch.arange(-0.36, 0.37, 0.12))
    coarse = [_respond(grey, guess, (guess.x, guess.y), unit=float(size), rotations=rotations, span=15) for size in sizes]
    table = torch.cat(coarse)
    x, y, unit, angle = table[table[:, 5].argmax(), :4].tolist()
    rotations = angle + torch.arange(-4.5, 5, 1.5) * (math.pi / 180)
    fine = []
    for size in (0.93, 0.965, 1.0, 1.035, 1.07):
        for right in (0.0, 0.5):
            for down in (0.0, 0.5):
                middle = (x + right * unit, y + down * unit)
                fine.append(_respond(grey, guess, middle, unit=size * unit, rotations=rotations, span=3))
    table = torch.cat(fine)
    weight = torch.softmax(table[:, 5] / 0.03, dim=0)
    return FacePose(*(weight @ table[:, :5]).tolist())


def _respond(grey: Tensor, guess: Guess, middle: tuple[float, float], *, unit: float, rotations: Tensor, span: int) -> Tensor:
    """Responses at span x span positions one template pixel apart, for several rotations.  -> [n,6]: pose, response, log posterior"""
    known = load()
    wide, high = COLUMNS + span - 1, ROWS + span - 1
    whole = max(1, round(unit))
    small = F.avg_pool2d(grey[None, None], whole, ceil_mode=True, count_include_pad=False) if whole > 1 else grey[None, None]
    extent = torch.tensor([small.shape[-1] * whole, small.shape[-2] * whole])
    cos, sin = torch.cos(rotations) * unit, torch.sin(rotations) * unit
    turn = torch.stack([torch.stack([cos, sin], -1), torch.stack([-sin, cos], -1)], -2)  # row vectors: (x, y) @ turn
    y, x = torch.meshgrid(torch.arange(high) + 0.5 - high / 2, torch.arange(wide) + 0.5 - wide / 2, indexing="ij")
    points = torch.einsum("hwi,tij->thwj", torch.stack([x, y], -1), turn) + torch.tensor(middle)
    seen = channels(
        F.grid_sample(small.expand(len(rotations), -1, -1, -1), 2 * points / extent - 1, padding_mode="border", align_corners=False)
    )
    length = F.conv2d(seen**2, oval().expand(1, seen.shape[1], -1, -1)).sqrt() + 1e-3
    response = F.conv2d(seen, known.weights[None]) * LOUDNESS / length + known.offset  # [turns,1,span,span]
    step = torch.arange(span) + 0.5 - span / 2
    offset = torch.stack(torch.meshgrid(step, step, indexing="xy"), -1)
    centres = torch.einsum("hwi,tij->thwj", offset, turn) + torch.tensor(middle)
    angle = rotations[:, None, None].expand(-1, span, span)
    off = ((centres - torch.tensor([guess.x, guess.y])) / guess.shift).square().sum(-1) + ((angle - guess.roll) / guess.angle) ** 2
    off = off + (math.log(unit / guess.unit) / guess.log_unit) ** 2
    rows = [
        centres[..., 0],
        centres[..., 1],
        torch.full_like(angle, unit),
        angle,
        response[:, 0],
        response[:, 0] - SHARE_OF_PRIOR / 2 * off,
    ]
    return torch.stack(rows, dim=-1).flatten(0, 2)


def fit(rounds: int = 80, ridge: float = 100.0, seed: int = 0) -> FaceFilter:
    """Fit the filter by least squares to targets that are 1 on an exactly aligned face, fall off with shift, size and roll, and are 0
    elsewhere."""
    rng = torch.Generator().manual_seed(seed)
    small = torch.from_numpy(data.lfw_subset()).float()[:, None, :, :COLUMNS]
    faces, others = torch.cat([small[:100], small[:100].flip(-1)]), torch.cat([small[100:], small[100:].flip(-1), _scenery(rng)])
    inside = oval()
    windows, targets = [], []
    for turn in range(rounds):
        roll, size, right, down, yaw = (torch.randn(5, generator=rng) * torch.tensor([0.25, 0.15, 2.5, 2.5, 1.2])).tolist()
        if turn % 4 == 0:
            roll = size = right = down = 0.0
        move = Move(roll, math.exp(size), right, down, yaw)
        nearness = math.exp(-0.5 * ((roll / 0.12) ** 2 + (size / 0.08) ** 2 + right**2 + down**2))
        windows.append(channels(relit(moved(faces, move), rng)))
        targets.append(torch.full((len(faces),), nearness))
    windows.append(channels(others))
    targets.append(torch.zeros(len(others)))
    rows, target = (torch.cat(windows) * inside).flatten(1), torch.cat(targets)
    rows = rows * (LOUDNESS / (rows.norm(dim=1, keepdim=True) + 1e-3))
    offset = target.mean()
    weights = torch.linalg.solve(rows.T @ rows + ridge * torch.eye(rows.shape[1]), rows.T @ (target - offset))
    return FaceFilter(weights.reshape(-1, ROWS, COLUMNS) * inside, float(offset))


def save(face_filter: FaceFilter, path: str) -> None:
    """Write a filter in half precision."""
    np.savez_compressed(path, weights=face_filter.weights.half().numpy(), offset=np.float32(face_filter.offset))


def moved(faces: Tensor, move: Move) -> Tensor:
    """Rotate, resize, shift and widen the faces, and push the middle of the face sideways inside its outline."""
    x, y = template_grid().unbind(-1)
    cos, sin = math.cos(move.roll) * move.size, math.sin(move.roll) * move.size
    across, along = (cos * x - sin * y) * move.width + move.right, sin * x + cos * y + move.down
    across = across + move.yaw * (1 - (2 * across / COLUMNS).clamp(-1, 1) ** 2)
    grid = torch.stack([2 * across / COLUMNS, 2 * along / ROWS], dim=-1).expand(len(faces), -1, -1, -1)
    return F.grid_sample(faces, grid, padding_mode="border", align_corners=False)


def relit(faces: Tensor, rng: torch.Generator) -> Tensor:
    """Light the faces from a random side."""
    x, y = template_grid().unbind(-1)
    sideways, above = (torch.randn(2, len(faces), 1, 1, 1, generator=rng) * torch.tensor([0.8, 0.4]).reshape(2, 1, 1, 1, 1)).unbind(0)
    light = torch.exp(2 * (sideways * x / COLUMNS + above * y / ROWS))
    return (faces * light / (1 + faces * (light - 1)).clamp(min=0.2)).clamp(0, 1.2)


def _scenery(rng: torch.Generator, count: int = 400) -> Tensor:
    """Windows of photographs without a face.  -> [n,1,ROWS,COLUMNS]"""
    windows = []
    for picture in (data.coffee(), data.rocket(), data.hubble_deep_field(), data.chelsea()):
        grey = torch.from_numpy(picture).float().mean(-1)[None, None] / 255
        for whole in (2, 4, 8):
            small = F.avg_pool2d(grey, whole)
            for _ in range(count // 12):
                top = int(torch.randint(small.shape[-2] - ROWS, (1,), generator=rng))
                left = int(torch.randint(small.shape[-1] - COLUMNS, (1,), generator=rng))
                windows.append(small[..., top : top + ROWS, left : left + COLUMNS])
    return torch.cat(windows)
