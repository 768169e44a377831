"""Samplers: they integrate a velocity field from noise to clean latents. No models.

Each is a coroutine that yields a query for the velocity, is sent the answer, and returns the clean latents, so that a scheduler with
several blocks in flight can answer their queries in any order. A new sampler is a coroutine and its entry in SAMPLERS.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from sonic.registry import Registry
from sonic.sampling.schedules import HIGHEST_UNIPC_SIGMA, TIMESTEPS

HIGHEST_SOLVED = 1 - 1e-6  # noise level at which UniPC begins where the schedule begins with pure noise, whose signal has no logarithm

Velocity = Callable[[Tensor, Tensor], Tensor]  # (x [B,C,T,H,W], sigma [B] or [B,T] in [0,1]) -> noise - clean


class Query(NamedTuple):
    """A sampler's query for the velocity: latents x [B,C,T,H,W], their noise level, and the sampling step (0..n-1) with that noise level.

    The noise level is a number on the host, so that reading it does not wait for a GPU.
    """

    x: Tensor
    sigma: float
    step: int

    @property
    def level(self) -> Tensor:
        """The noise level of every video of the batch, as networks read it.  -> float32 [B]"""
        return torch.full((self.x.shape[0],), self.sigma, dtype=torch.float32, device=self.x.device)


SamplerCoroutine = Generator[Query, Tensor, Tensor]  # yields queries, is sent the velocity of each, returns the clean latents


def every_step(steps: int) -> list[int]:
    """The steps queried by a sampler that needs one velocity per step."""
    return list(range(steps))


def both_ends(steps: int) -> list[int]:
    """The steps queried by a sampler that needs the velocity at both ends of each step, except at the end of the last one."""
    return [step for index in range(steps) for step in (index, index + 1) if step < steps]


def exact(sigma: float) -> float:
    """The timestep of a noise level."""
    return TIMESTEPS * sigma


def rounded_down(sigma: float) -> float:
    """The whole timestep at or below a noise level, which Wan's solvers give to the model."""
    return float(int(TIMESTEPS * sigma))


def below_noise(sigma: float) -> float:
    """The same, at most 999: diffusers' UniPC starts one timestep below pure noise."""
    return rounded_down(min(sigma, HIGHEST_UNIPC_SIGMA))


@dataclass(frozen=True)
class Sampler:
    """A sampler: its coroutine (noise, sigmas [n+1] from 1 to 0, rng), the steps it queries, in order, for n steps, and the timestep
    that the model is given at a noise level."""

    coroutine: Callable[[Tensor, Tensor, torch.Generator], SamplerCoroutine]
    steps_queried: Callable[[int], list[int]] = every_step
    timestep: Callable[[float], float] = exact

    def __call__(self, velocity: Velocity, noise: Tensor, sigmas: Tensor, rng: torch.Generator) -> Tensor:
        """Sample with a velocity function that answers every query."""
        return answer_all(self.coroutine(noise, sigmas, rng), velocity)

    def timesteps(self, sigmas: Tensor) -> list[float]:
        """The timesteps that the model is given, in order.  sigmas [n+1]"""
        levels = sigmas.tolist()
        return [self.timestep(levels[step]) for step in self.steps_queried(len(levels) - 1)]


def answer_all(sampling: SamplerCoroutine, velocity: Velocity) -> Tensor:
    """The clean latents of a sampler whose queries are all answered by a velocity function."""
    answer = None
    while True:
        try:
            query = sampling.send(answer)
        except StopIteration as end:
            return end.value
        answer = velocity(query.x, query.level)


def euler(noise: Tensor, sigmas: Tensor, rng: torch.Generator) -> SamplerCoroutine:
    """Euler steps of dx/dsigma = velocity, one evaluation each. Source: rectified flow, arXiv 2209.03003."""
    x = noise
    for step, (now, then) in enumerate(pairwise(sigmas.tolist())):
        x = x + (then - now) * (yield Query(x, now, step))
    return x


def heun(noise: Tensor, sigmas: Tensor, rng: torch.Generator) -> SamplerCoroutine:
    """Heun steps along the mean velocity of both ends, two evaluations each except the last. Source: EDM, arXiv 2206.00364, alg. 1."""
    x = noise
    for step, (now, then) in enumerate(pairwise(sigmas.tolist())):
        slope = yield Query(x, now, step)
        guess = x + (then - now) * slope
        x = guess if then == 0 else x + (then - now) / 2 * (slope + (yield Query(guess, then, step + 1)))
    return x


def unipc(noise: Tensor, sigmas: Tensor, rng: torch.Generator) -> SamplerCoroutine:
    """UniPC of order 2, the predictor-corrector that Wan is published with; the model gets whole timesteps of 1000.

    Its results are bit for bit those of diffusers' UniPCMultistepScheduler (bh2), but its coefficients, in float32, stay on the host, so
    that no step waits for a GPU. Source: UniPC, arXiv 2302.04867.
    """
    level, steps = sigmas.cpu().clamp(max=HIGHEST_SOLVED).float(), len(sigmas) - 1
    alpha, log_snr = 1 - level, (1 - level).log() - level.log()
    x = start = older = last = noise  # `start`: latents before the last step; `last`, `older`: the clean ones predicted then, and before

    def ahead(origin: Tensor, clean: Tensor, step: int, bend: Tensor | float) -> Tensor:
        """The latents after a step from `origin` towards `clean`, if the clean latents change by `bend` within the step."""
        grown = alpha[step + 1] * torch.expm1(log_snr[step] - log_snr[step + 1])
        return level[step + 1] / level[step] * origin - grown * clean - grown * bend

    def past(step: int) -> Tensor:
        """The length of the step before `step`, as a negative multiple of its own."""
        return (log_snr[step - 1] - log_snr[step]) / (log_snr[step + 1] - log_snr[step])

    for step, sigma in enumerate(sigmas[:-1].tolist()):
        clean = x - level[step] * (yield Query(x, below_noise(sigma) / TIMESTEPS, step))
        if step == 1:  # the last step is repeated with what is predicted at its end
            x = ahead(start, last, 0, 0.5 * (clean - last))
        elif step:
            before, now = _corrector(past(step - 1), log_snr[step - 1] - log_snr[step])
            x = ahead(start, last, step - 1, before * ((older - last) / past(step - 1)) + now * (clean - last))
        start, older, last = x, last, clean
        x = ahead(start, last, step, 0.5 * ((older - last) / past(step)) if 0 < step < steps - 1 else 0.0)
    return x


def dpmpp(noise: Tensor, sigmas: Tensor, rng: torch.Generator) -> SamplerCoroutine:
    """DPM-Solver++(2M), multistep of order 2, its last step of order 1; the model gets whole timesteps of 1000, as in Wan.

    Source: arXiv 2211.01095, alg. 2, with the midpoint's weight.
    """
    x, previous, last_stride = noise, None, math.inf
    for step, (now, then) in enumerate(pairwise(sigmas.tolist())):
        clean = x - now * (yield Query(x, rounded_down(now) / TIMESTEPS, step))
        stride = _log_snr(then) - _log_snr(now)
        bend = stride / last_stride if math.isfinite(last_stride) and then > 0 else 0.0
        ahead = clean if previous is None or bend == 0 else clean + bend / 2 * (clean - previous)
        x = then / now * x - (1 - then) * math.expm1(-stride) * ahead
        previous, last_stride = clean, stride
    return x


SAMPLERS: Registry[Sampler] = Registry(
    "sampler.name",
    {
        "euler": Sampler(euler),
        "heun": Sampler(heun, both_ends),
        "unipc": Sampler(unipc, timestep=below_noise),
        "dpmpp": Sampler(dpmpp, timestep=rounded_down),
    },
)


def _corrector(past: Tensor, stride: Tensor) -> Tensor:
    """UniPC's weights of how the clean latents changed before a step, and within it; minus `stride` is its length in log-SNR.  -> [2]"""
    one, grown = torch.ones(()), torch.expm1(stride)
    first = grown / stride - 1
    second = first / stride - 0.5
    return torch.linalg.solve(torch.stack([torch.stack([one, one]), torch.stack([past, one])]), torch.stack([first, second * 2]) / grown)


def _log_snr(sigma: float) -> float:
    """log((1 - sigma) / sigma), from -inf at pure noise to inf at clean latents."""
    if sigma in (0.0, 1.0):
        return math.inf if sigma == 0 else -math.inf
    return math.log((1 - sigma) / sigma)
