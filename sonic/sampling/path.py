"""The straight path between clean latents and noise, and the conversion of a model's output to the velocity along it."""

from __future__ import annotations

from collections.abc import Callable

from einops import rearrange
from torch import Tensor

from sonic.registry import Registry
from sonic.types import pick

ToVelocity = Callable[[Tensor, Tensor, Tensor], Tensor]  # (prediction, x, sigma) -> noise - clean


def expand_like(sigma: Tensor, latents: Tensor) -> Tensor:
    """Noise levels [B] or [B,T] in a shape that broadcasts with latents [B,C,T,H,W]; any other shape is returned as it is."""
    patterns = {1: "b -> b 1 1 1 1", 2: "b t -> b 1 t 1 1"}
    return rearrange(sigma, patterns[sigma.ndim]).to(latents) if sigma.ndim in patterns else sigma


def interpolate(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """The noisy latents x = (1 - sigma)·clean + sigma·noise. Source: rectified flow, arXiv 2209.03003."""
    level = expand_like(sigma, clean)
    return (1 - level) * clean + level * noise


def from_velocity(prediction: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """The velocity noise - clean of a model that predicts it directly."""
    return prediction


def from_clean(prediction: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """The velocity of a model that predicts the clean latents, from x - clean = sigma·(noise - clean). Needs sigma > 0."""
    return (x - prediction) / expand_like(sigma, x)


PREDICTIONS: Registry[ToVelocity] = Registry("model.prediction", {"velocity": from_velocity, "clean": from_clean})


def velocity_from(kind: str) -> ToVelocity:
    """The function that converts the output of a model with `prediction: kind` to a velocity."""
    return pick(PREDICTIONS, kind, "model.prediction")
