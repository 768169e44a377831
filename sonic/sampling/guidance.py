"""Wrappers of a velocity function that strengthen a condition."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from sonic.sampling.samplers import Velocity

Wrapper = Callable[[Velocity], Velocity]


def guided(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """u + scale·(c - u) of the unconditional velocity u and the conditional one c.

    Source: classifier-free guidance, arXiv 2207.12598.
    """
    return unconditional + scale * (conditional - unconditional)


def guidance(unconditional: Velocity, scale: float) -> Wrapper:
    """A wrapper that turns the conditional velocity into the guided one; at scale 1 the unconditional one is not evaluated."""

    def wrap(conditional: Velocity) -> Velocity:
        if scale == 1:
            return conditional
        return lambda x, sigma: guided(unconditional(x, sigma), conditional(x, sigma), scale)

    return wrap
