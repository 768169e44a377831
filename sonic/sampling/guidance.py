"""Wrappers of a velocity function that strengthen a condition."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from sonic.sampling.samplers import Velocity

Wrapper = Callable[[Velocity], Velocity]


def guidance(unconditional: Velocity, scale: float) -> Wrapper:
    """A wrapper that turns the conditional velocity c into u + scale·(c - u), u the unconditional one; at scale 1 u is not evaluated.

    Source: classifier-free guidance, arXiv 2207.12598.
    """

    def wrap(conditional: Velocity) -> Velocity:
        def guided(x: Tensor, sigma: Tensor) -> Tensor:
            base = unconditional(x, sigma)
            return base + scale * (conditional(x, sigma) - base)

        return conditional if scale == 1 else guided

    return wrap
