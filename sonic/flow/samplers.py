"""Ways of walking from noise to clean latents along a velocity field; they know tensors, not models."""

from __future__ import annotations

import math
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


def dpmpp(velocity: Velocity, noise: Tensor, sigmas: Tensor, rng: torch.Generator) -> Tensor:
    """The multistep solver of order 2 on the clean latents, its last step of order 1; it asks at whole timesteps of 1000, as Wan does.

    Source: DPM-Solver++(2M), arXiv 2211.01095, alg. 2, with the midpoint's weight.
    """
    x, older, last_stride = noise, None, math.inf
    for now, then in pairwise(sigmas.tolist()):
        clean = x - now * velocity(x, _level(int(TIMESTEPS * now) / TIMESTEPS, x))
        stride = _log_snr(then) - _log_snr(now)
        bend = stride / last_stride if math.isfinite(last_stride) and then > 0 else 0.0
        ahead = clean if older is None or bend == 0 else clean + bend / 2 * (clean - older)
        x = then / now * x - (1 - then) * math.expm1(-stride) * ahead
        older, last_stride = clean, stride
    return x


SAMPLERS: dict[str, Sampler] = {"euler": euler, "heun": heun, "unipc": unipc, "dpmpp": dpmpp}
TIMESTEPS = 1000


def _log_snr(sigma: float) -> float:
    """log((1 - sigma) / sigma), from -inf at pure noise to inf at clean latents."""
    if sigma in (0.0, 1.0):
        return math.inf if sigma == 0 else -math.inf
    return math.log((1 - sigma) / sigma)


def _level(sigma: float, x: Tensor) -> Tensor:
    """One noise level for the whole batch.  -> [B]"""
    return torch.full((x.shape[0],), sigma, dtype=torch.float32, device=x.device)
