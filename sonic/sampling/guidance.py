"""Wrappers of a velocity that push the result towards a condition."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from sonic.sampling.samplers import Velocity

Wrapper = Callable[[Velocity], Velocity]


def guidance(unconditional: Velocity, scale: float) -> Wrapper:
    """Away from the unconditional velocity: u + scale·(c - u); at scale 1 the second evaluation is not made.

    Source: classifier-free guidance, arXiv 2207.12598.
    """

    def wrap(conditional: Velocity) -> Velocity:
        def guided(x: Tensor, sigma: Tensor) -> Tensor:
            base = unconditional(x, sigma)
            return base + scale * (conditional(x, sigma) - base)

        return conditional if scale == 1 else guided

    return wrap
