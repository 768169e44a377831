"""Guidance: the velocity with a condition, extrapolated away from the velocity without it."""

from __future__ import annotations

from torch import Tensor

from sonic.sampling.samplers import Velocity


def guided(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """u + scale·(c - u) of the unconditional velocity u and the conditional one c.

    Source: classifier-free guidance, arXiv 2207.12598.
    """
    return unconditional + scale * (conditional - unconditional)


def guided_velocity(unconditional: Velocity, conditional: Velocity, scale: float) -> Velocity:
    """The velocity function with guidance; at scale 1 the unconditional one is not evaluated."""
    if scale == 1:
        return conditional
    return lambda x, sigma: guided(unconditional(x, sigma), conditional(x, sigma), scale)
