"""Noise schedules: explicit lists of sigmas that fall from 1, or nearly 1, to 0."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sonic.registry import Registry
from sonic.sampling.karras import flow_sigma, karras_sigmas
from sonic.types import pick

Schedule = Callable[[int, float], list[float]]  # (steps, shift) -> steps + 1 sigmas, falling, the last one 0

HIGHEST_UNIPC_SIGMA = 0.9990000128746033  # 1 - 1/1000 in the precision of the published tables
TIMESTEPS = 1000  # timesteps of the published models; a timestep is 1000·sigma
LIVE_AVATAR_SHIFT = 3.0
LIVE_AVATAR_TABLES = (3, 4)  # numbers of steps for which a table is published with Live Avatar, which was distilled for 4
TOUCH_UP_FROM = 4  # smallest number of steps of which the last is the short one from 0.009 to 0


def shift_up(sigma: float, shift: float) -> float:
    """The shifted noise level shift·sigma / (1 + (shift - 1)·sigma), higher for shift > 1. Source: SD3, arXiv 2403.03206, eq. 23."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def linear(steps: int, shift: float = 3.0) -> list[float]:
    """Equal steps from 1 to 0, then shifted; shift 1 leaves them equal."""
    return [shift_up(1 - index / steps, shift) for index in range(steps)] + [0.0]


def unipc(steps: int, shift: float = 3.0) -> list[float]:
    """The noise levels of the published UniPC solver, which start one training timestep below 1."""
    return [shift_up(HIGHEST_UNIPC_SIGMA * (1 - index / steps), shift) for index in range(steps)] + [0.0]


def twice_shifted(steps: int, shift: float = 3.0) -> list[float]:
    """The noise levels of the published few-step rollout: the ends of the range are shifted first, then the points between them, so
    the last step is very short (four steps: 1, .858, .602, .009, 0)."""
    lowest, intervals = shift_up(1 / TIMESTEPS, shift), max(1, steps - 1)
    return [shift_up(1 - (1 - lowest) * index / intervals, shift) for index in range(steps)] + [0.0]


def live_avatar(steps: int, shift: float = LIVE_AVATAR_SHIFT) -> list[float]:
    """The noise levels of Live Avatar, its published tables among them: `twice_shifted` with its very short last step from four steps
    on, without it below (two steps: 1, .751, 0, where `twice_shifted`, the published program, has 1, .009, 0).

    They contain the shift, so `shift` is not read.
    """
    if steps >= TOUCH_UP_FROM:
        return twice_shifted(steps, LIVE_AVATAR_SHIFT)
    return [*twice_shifted(steps + 1, LIVE_AVATAR_SHIFT)[:steps], 0.0]


def karras(steps: int, shift: float = 3.0) -> list[float]:
    """The noise levels that Stable Video Diffusion is sampled with, 700 to 0.002 and 0, as shares of noise in [0,1]: their spacing is not
    shifted."""
    return [flow_sigma(sigma) for sigma in karras_sigmas(steps).tolist()]


def is_table(name: str, steps: int) -> bool:
    """Whether a schedule with this number of steps is one of the tables published with Live Avatar, not computed."""
    return name == "live_avatar" and steps in LIVE_AVATAR_TABLES


SCHEDULES: Registry[Schedule] = Registry(
    "sampler.schedule", {"linear": linear, "unipc": unipc, "twice_shifted": twice_shifted, "live_avatar": live_avatar, "karras": karras}
)


def sigmas_of(name: str, steps: int, shift: float) -> Tensor:
    """The named schedule as float64 [steps + 1]."""
    return torch.tensor(pick(SCHEDULES, name, "sampler.schedule")(steps, shift), dtype=torch.float64)
