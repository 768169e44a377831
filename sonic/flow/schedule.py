"""Which noise levels a sampler visits: explicit lists of sigmas that fall from (nearly) 1 to 0."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sonic.types import pick

Schedule = Callable[[int, float], list[float]]  # (steps, shift) -> steps + 1 sigmas, falling, the last one 0

HIGHEST_UNIPC_SIGMA = 0.9990000128746033  # 1 - 1/1000 as the published tables hold it
TIMESTEPS = 1000  # noise levels that the published models count; a timestep is 1000·sigma


def shift_up(sigma: float, shift: float) -> float:
    """Move a noise level up (shift > 1): shift·sigma / (1 + (shift - 1)·sigma). Source: SD3, arXiv 2403.03206, eq. 23."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def linear(steps: int, shift: float = 3.0) -> list[float]:
    """Equal steps from 1 to 0, then shifted; shift 1 leaves them equal."""
    return [shift_up(1 - index / steps, shift) for index in range(steps)] + [0.0]


def unipc(steps: int, shift: float = 3.0) -> list[float]:
    """The table the published UniPC solver walks: it starts one training step below 1."""
    return [shift_up(HIGHEST_UNIPC_SIGMA * (1 - index / steps), shift) for index in range(steps)] + [0.0]


def twice_shifted(steps: int, shift: float = 3.0) -> list[float]:
    """The table of the published few-step rollout: the ends of the range are shifted before its points are, so the
    last step is a touch-up (four steps: 1, .858, .602, .009, 0)."""
    lowest, intervals = shift_up(1 / TIMESTEPS, shift), max(1, steps - 1)
    return [shift_up(1 - (1 - lowest) * index / intervals, shift) for index in range(steps)] + [0.0]


def live_avatar_4step(steps: int = 4, shift: float = 3.0) -> list[float]:
    """The few-step table that Live Avatar was distilled for; `shift` is in it already. Raises ValueError for other numbers of steps."""
    return _table("live_avatar_4step", twice_shifted(4, 3.0), steps)


def live_avatar_3step(steps: int = 3, shift: float = 3.0) -> list[float]:
    """The same table without the touch-up at its end. Raises ValueError for other numbers of steps."""
    return _table("live_avatar_3step", [*twice_shifted(4, 3.0)[:3], 0.0], steps)


def _table(name: str, sigmas: list[float], steps: int) -> list[float]:
    if steps != len(sigmas) - 1:
        raise ValueError(f"sampler.schedule={name} is a table of {len(sigmas) - 1} steps, not of sampler.sample_steps={steps}")
    return sigmas


SCHEDULES: dict[str, Schedule] = {
    "linear": linear,
    "unipc": unipc,
    "twice_shifted": twice_shifted,
    "live_avatar_4step": live_avatar_4step,
    "live_avatar_3step": live_avatar_3step,
}


def sigmas_of(name: str, steps: int, shift: float) -> Tensor:
    """The named schedule as float64 [steps + 1]. Raises ValueError for no steps or a shift that is not positive."""
    if steps < 1:
        raise ValueError(f"sampler.sample_steps={steps} makes no video; use 1 or more")
    if shift <= 0:
        raise ValueError(f"sampler.sample_shift={shift} must be positive; 1 leaves the schedule as it is")
    return torch.tensor(pick(SCHEDULES, name, "sampler.schedule")(steps, shift), dtype=torch.float64)
