"""The straight path between clean latents and noise, and what a model's output says about it."""

from __future__ import annotations

from collections.abc import Callable

from einops import rearrange
from torch import Tensor

from sonic.types import pick

ToVelocity = Callable[[Tensor, Tensor, Tensor], Tensor]  # (prediction, x, sigma) -> noise - clean


def spread(sigma: Tensor, latents: Tensor) -> Tensor:
    """Noise levels [B] or [B,T] as something that multiplies latents [B,C,T,H,W]; any other shape stays as it is."""
    patterns = {1: "b -> b 1 1 1 1", 2: "b t -> b 1 t 1 1"}
    return rearrange(sigma, patterns[sigma.ndim]).to(latents) if sigma.ndim in patterns else sigma


def interpolate(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x = (1 - sigma)·clean + sigma·noise. Source: rectified flow, arXiv 2209.03003."""
    level = spread(sigma, clean)
    return (1 - level) * clean + level * noise


def from_velocity(prediction: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """The model says noise - clean itself."""
    return prediction


def from_clean(prediction: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """The model says the clean latents: x - clean = sigma·(noise - clean). Needs sigma > 0."""
    return (x - prediction) / spread(sigma, x)


PREDICTIONS: dict[str, ToVelocity] = {"velocity": from_velocity, "clean": from_clean}


def velocity_from(kind: str) -> ToVelocity:
    """How to read the output of a model whose `prediction` is `kind`."""
    return pick(PREDICTIONS, kind, "model.prediction")
