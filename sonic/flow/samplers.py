"""Ways of walking from noise to clean latents along a velocity field; they know tensors, not models.

Each is written as a walk: a generator that yields where it wants to know the velocity, is sent it, and returns the clean
latents. So whoever has several films' blocks under way can answer them in any order; a `Sampler` is a walk with a velocity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from functools import wraps
from itertools import pairwise

import torch
from torch import Tensor

from sonic.flow.schedule import TIMESTEPS

Velocity = Callable[[Tensor, Tensor], Tensor]  # (x [B,C,T,H,W], sigma [B] or [B,T] in [0,1]) -> noise - clean
Sampler = Callable[[Velocity, Tensor, Tensor, torch.Generator], Tensor]  # (velocity, noise, sigmas [n+1] 1→0, rng) -> clean
Walk = Generator[tuple[Tensor, Tensor], Tensor, Tensor]  # yields (x, sigma), is sent the velocity there, returns clean


def _sampler(walk: Callable[[Tensor, Tensor, torch.Generator], Walk]) -> Sampler:
    """The sampler of a walk: every question is answered by `velocity` at once."""

    @wraps(walk)
    def sample(velocity: Velocity, noise: Tensor, sigmas: Tensor, rng: torch.Generator) -> Tensor:
        under_way, said = walk(noise, sigmas, rng), None
        while True:
            try:
                said = velocity(*under_way.send(said))
            except StopIteration as end:
                return end.value

    return sample


def euler(noise: Tensor, sigmas: Tensor, rng: torch.Generator) -> Walk:
    """Straight steps of dx/dsigma = velocity, one evaluation each. Source: rectified flow, arXiv 2209.03003."""
    x = noise
    for now, then in pairwise(sigmas.tolist()):
        x = x + (then - now) * (yield x, _level(now, x))
    return x


def heun(noise: Tensor, sigmas: Tensor, rng: torch.Generator) -> Walk:
    """Steps along the mean of the slopes at both ends, two evaluations each but for the last. Source: EDM, arXiv 2206.00364, alg. 1."""
    x = noise
    for now, then in pairwise(sigmas.tolist()):
        slope = yield x, _level(now, x)
        guess = x + (then - now) * slope
        x = guess if then == 0 else x + (then - now) / 2 * (slope + (yield guess, _level(then, x)))
    return x


def unipc(noise: Tensor, sigmas: Tensor, rng: torch.Generator) -> Walk:
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
        x = solver.step((yield x, level), timestep, x, return_dict=False)[0]
    return x


def dpmpp(noise: Tensor, sigmas: Tensor, rng: torch.Generator) -> Walk:
    """The multistep solver of order 2 on the clean latents, its last step of order 1; it asks at whole timesteps of 1000, as Wan does.

    Source: DPM-Solver++(2M), arXiv 2211.01095, alg. 2, with the midpoint's weight.
    """
    x, older, last_stride = noise, None, math.inf
    for now, then in pairwise(sigmas.tolist()):
        clean = x - now * (yield x, _level(int(TIMESTEPS * now) / TIMESTEPS, x))
        stride = _log_snr(then) - _log_snr(now)
        bend = stride / last_stride if math.isfinite(last_stride) and then > 0 else 0.0
        ahead = clean if older is None or bend == 0 else clean + bend / 2 * (clean - older)
        x = then / now * x - (1 - then) * math.expm1(-stride) * ahead
        older, last_stride = clean, stride
    return x


WALKS: dict[str, Callable[[Tensor, Tensor, torch.Generator], Walk]] = {"euler": euler, "heun": heun, "unipc": unipc, "dpmpp": dpmpp}
SAMPLERS: dict[str, Sampler] = {name: _sampler(walk) for name, walk in WALKS.items()}


def _log_snr(sigma: float) -> float:
    """log((1 - sigma) / sigma), from -inf at pure noise to inf at clean latents."""
    if sigma in (0.0, 1.0):
        return math.inf if sigma == 0 else -math.inf
    return math.log((1 - sigma) / sigma)


def _level(sigma: float, x: Tensor) -> Tensor:
    """One noise level for the whole batch.  -> [B]"""
    return torch.full((x.shape[0],), sigma, dtype=torch.float32, device=x.device)
