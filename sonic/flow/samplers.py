"""Ways of walking from noise to clean latents along a velocity field; they know tensors, not models."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]  # (x [B,C,T,H,W], sigma [B] or [B,T] in [0,1]) -> noise - clean
Sampler = Callable[[Velocity, Tensor, Tensor, torch.Generator], Tensor]  # (velocity, noise, sigmas [n+1] 1→0, rng) -> clean


def euler(velocity: Velocity, noise: Tensor, sigmas: Tensor, rng: torch.Generator) -> Tensor:
    """Straight steps of dx/dsigma = velocity, one evaluation each. Source: rectified flow, arXiv 2209.03003."""
    x = noise
    for now, then in pairwise(sigmas.tolist()):
        x = x + (then - now) * velocity(x, _level(now, x))
    return x


def heun(velocity: Velocity, noise: Tensor, sigmas: Tensor, rng: torch.Generator) -> Tensor:
    """Steps along the mean of the slopes at both ends, two evaluations each but for the last. Source: EDM, arXiv 2206.00364, alg. 1."""
    x = noise
    for now, then in pairwise(sigmas.tolist()):
        slope = velocity(x, _level(now, x))
        guess = x + (then - now) * slope
        x = guess if then == 0 else x + (then - now) / 2 * (slope + velocity(guess, _level(then, x)))
    return x


def unipc(velocity: Velocity, noise: Tensor, sigmas: Tensor, rng: torch.Generator) -> Tensor:
    """The predictor-corrector of order 2 that Wan is published with; it rounds noise levels down to whole timesteps of 1000.

    Source: UniPC, arXiv 2302.04867.
    """
    from diffusers import UniPCMultistepScheduler

    solver = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    solver.set_timesteps(sigmas=sigmas[:-1].cpu().numpy(), device=noise.device)
    solver.set_begin_index(0)
    x = noise
    for timestep in solver.timesteps:
        level = _level(int(timestep) / solver.config.num_train_timesteps, x)
        x = solver.step(velocity(x, level), timestep, x, return_dict=False)[0]
    return x


SAMPLERS: dict[str, Sampler] = {"euler": euler, "heun": heun, "unipc": unipc}


def _level(sigma: float, x: Tensor) -> Tensor:
    """One noise level for the whole batch.  -> [B]"""
    return torch.full((x.shape[0],), sigma, dtype=torch.float32, device=x.device)
