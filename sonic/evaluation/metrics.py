"""Quality metrics computed from pixels and tracks, without networks: likeness, lip sync, dynamics, block joins, flicker, memory.

Frames are float [F,3,H,W] or [3,H,W] in [-1,1] unless said otherwise; tracks are numpy arrays at the video's frame rate.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from sonic.synthetic.puppet import MouthShape


def psnr(found: Tensor, truth: Tensor, mask: Tensor | None = None) -> float:
    """Peak signal-to-noise ratio in dB over the pixels where `mask` [H,W] is above zero (None = everywhere)."""
    error = (found - truth).square()
    mean = error.mean() if mask is None else (error * mask).sum() / (mask.sum() * (error.numel() / mask.numel()))
    return float(10 * torch.log10(4 / mean.clamp(min=1e-12)))


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's r of two tracks; 0 when one of them is constant."""
    a, b = np.asarray(a, np.float64) - np.mean(a), np.asarray(b, np.float64) - np.mean(b)
    size = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / size) if size > 1e-9 else 0.0


def best_lag(found: np.ndarray, truth: np.ndarray, max_lag: int = 12) -> tuple[float, float]:
    """Highest correlation over shifts of ±`max_lag` frames, and that shift with a parabolic fraction (> 0: `found` is late)."""
    lags = np.arange(-max_lag, max_lag + 1)
    values = []
    for lag in lags:
        late, early = found[max(0, lag) : len(found) + min(0, lag)], truth[max(0, -lag) : len(truth) - max(0, lag)]
        values.append(correlation(late, early))
    position, best = peak(values)
    return best, position - max_lag


def peak(values: Sequence[float]) -> tuple[float, float]:
    """Index of the largest value with a parabolic fraction, which is 0 at the ends, and that value."""
    best, fraction = int(np.argmax(values)), 0.0
    if 0 < best < len(values) - 1:
        before, here, after = values[best - 1 : best + 2]
        bend = before - 2 * here + after
        fraction = 0.5 * (before - after) / bend if bend < 0 else 0.0
    return float(best + fraction), values[best]


def mouth_opening(frames: Tensor, rest: Tensor, mouth: MouthShape) -> np.ndarray:
    """Displacement of the lower lip from rest in mouth units, measured in the pixels.  -> [F]

    The strip from the edge of the lower lip downwards is cut from the resting frame and located in every frame along the mouth's
    vertical: least squared difference over the middle columns, then a parabola through the minimum. The strip extends to the chin,
    so that a smeared or tinted lip does not mislead the match.
    """
    step = 0.02
    shifts = torch.arange(-0.6, 1.3, step)
    across = torch.linspace(-0.42, 0.42, 11)
    arch = (1 - (across / 0.97) ** 2) ** 0.7
    edge = mouth.curve + 0.65 * mouth.gap - mouth.curve * across**2  # of the lower lip at rest, below the middle of the mouth
    down = torch.linspace(0.04, 0.9, 29)
    x = across.expand(len(down), -1)
    y = down.unsqueeze(1) + edge
    template = _sample(rest.unsqueeze(0), mouth, x=x, y=y)[0]
    moved = rearrange(shifts, "k -> k 1 1") * arch + y
    weight = torch.exp(-((across / 0.35) ** 2)) * torch.linspace(1.0, 0.5, len(down)).unsqueeze(1)
    costs = []
    for part in frames.split(32):
        strips = _sample(part, mouth, x=x.expand_as(moved), y=moved)  # [part's frames, 3, shifts, rows, columns]
        costs.append(((strips - rearrange(template, "c v x -> c 1 v x")).square() * weight).mean((1, 3, 4)))
    return _lowest(torch.cat(costs), shifts, step)


def mouth_mask(mouth: MouthShape, height: int, width: int) -> Tensor:
    """Mask that is 0 where the mouth can move, 1 everywhere else.  -> [H,W]"""
    ys, xs = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    cos, sin = np.cos(mouth.roll), np.sin(mouth.roll)
    dx, dy = (xs - mouth.x) / mouth.unit, (ys - mouth.y) / mouth.unit
    across, down = dx * cos + dy * sin, dy * cos - dx * sin
    return ((across.abs() > 1.35) | (down < -0.7) | (down > 1.6)).float()


def dynamics_ratio(found: np.ndarray, truth: np.ndarray) -> float:
    """Amount of motion of a track relative to the truth: ratio of standard deviations."""
    return float(np.std(found) / max(float(np.std(truth)), 1e-9))


def track_distance(found: np.ndarray, reference: np.ndarray) -> float:
    """Root mean square difference of two tracks, relative to the standard deviation of the reference."""
    return float(np.sqrt(np.mean(np.square(found - reference))) / max(float(np.std(reference)), 1e-9))


def join_ratio(frames: Tensor, block: int) -> float:
    """Mean change between frames across the ends of blocks of `block` frames, relative to the mean change elsewhere."""
    change = (frames[1:] - frames[:-1]).abs().mean((1, 2, 3))
    joins = (torch.arange(len(change)) + 1) % block == 0
    if not joins.any():
        return 1.0
    return float(change[joins].mean() / change[~joins].mean().clamp(min=1e-9))


def flicker(frames: Tensor) -> float:
    """Mean absolute second difference of pixels over time, scaled to [0,1]: how much pixels jump and jump back."""
    return float((frames[2:] - 2 * frames[1:-1] + frames[:-2]).abs().mean() / 4)


def mean_and_interval(values: Sequence[float]) -> dict:
    """Mean, half width of its 95 % confidence interval (normal approximation; None for a single value) and the values themselves."""
    interval = 1.96 * float(np.std(values, ddof=1)) / len(values) ** 0.5 if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "ci95": interval, "clips": [float(v) for v in values]}


def in_words(figure: Mapping) -> str:
    """A result of `mean_and_interval` as text, such as "0.812 ± 0.034", or "0.812" where one clip has no interval."""
    return f"{figure['mean']:.3f}" + ("" if figure["ci95"] is None else f" ± {figure['ci95']:.3f}")


def peak_rss_gib() -> float:
    """Highest resident memory of this process so far, in GiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _sample(frames: Tensor, mouth: MouthShape, *, x: Tensor, y: Tensor) -> Tensor:
    """Sample frames [F,3,H,W] at mouth coordinates x, y in units, of any shape [...].  -> [F,3,...]"""
    height, width = frames.shape[-2:]
    cos, sin = float(np.cos(mouth.roll)), float(np.sin(mouth.roll))
    px = mouth.x + mouth.unit * (x * cos - y * sin)
    py = mouth.y + mouth.unit * (x * sin + y * cos)
    grid = torch.stack([px / width, py / height], -1) * 2 - 1
    flat = grid.reshape(1, 1, -1, 2).expand(frames.shape[0], -1, -1, -1)
    sampled = F.grid_sample(frames, flat, mode="bilinear", padding_mode="border", align_corners=False)
    return sampled.reshape(*frames.shape[:2], *x.shape)


def _lowest(costs: Tensor, shifts: Tensor, step: float) -> np.ndarray:
    """Shift of the least cost of every frame, refined by a parabola.  costs [F,shifts] -> [F]"""
    best = costs.argmin(1).clamp(1, costs.shape[1] - 2)
    before, here, after = (costs.gather(1, (best + k).unsqueeze(1))[:, 0] for k in (-1, 0, 1))
    bend = (before - 2 * here + after).clamp(min=1e-12)
    return (shifts[best] + step * (0.5 * (before - after) / bend).clamp(-1, 1)).numpy()
