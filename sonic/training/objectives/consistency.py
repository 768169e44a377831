"""Consistency along the teacher's path: from any point of a sampling step, one step to where the teacher's path leaves it.

With one sampling step this is consistency distillation (arXiv 2303.01469), with several its phases (arXiv 2405.18407); a `leap` of
all steps never takes the student's own word and is plain trajectory distillation. A window's blocks share their noise level, so
block-causal forwards of the window are the rollout's own, each sampling step with its own ring.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from sonic.config import FIXED_STEPS, SamplerConfig
from sonic.model.dit import AvatarDiT
from sonic.model.execution import LOCAL, Execution
from sonic.sampling.path import interpolate, spread
from sonic.sampling.samplers import Velocity
from sonic.sampling.schedules import sigmas_of
from sonic.training.objective_config import ConsistencyConfig
from sonic.training.objectives import Batch, Losses
from sonic.training.objectives.distill import Distillation, liveliness
from sonic.training.objectives.flow_match import clip_error, conditions_of
from sonic.training.objectives.networks import STUDENT, TEACHER, Make
from sonic.training.train_config import TrainConfig


class Consistency(Distillation):
    """One role beside the teacher."""

    config: ConsistencyConfig

    def __init__(self, config: TrainConfig, dataset: object = None, *, make: Make = AvatarDiT, execution: Execution = LOCAL) -> None:
        super().__init__(config, dataset, (STUDENT,), make=make, execution=execution)
        self.path, self.stride = teacher_path(self.config.sampler, self.config.teacher_steps)

    def losses(self, role: str, batch: Batch, rng: torch.Generator) -> Losses:
        """Weighted error of where the student steps to, in what its head names.  batch: see FlowMatch.losses"""
        clean = batch["latents"]
        told, first_block = conditions_of(batch, self.model_config), self.first_block(rng)
        place = self._places(clean.shape[0], rng)
        path = self.path.to(clean)
        end = (place // self.stride + 1) * self.stride
        sigma, last = path[place], path[end]
        x = interpolate(clean, torch.randn(clean.shape, generator=rng, device=rng.device), sigma)
        student = self.velocity(STUDENT, told, first_block)
        aim = self._aim(x, place, end, student=student, teacher=self.velocity(TEACHER, told, first_block))
        wanted = (aim - x) / spread(last - sigma, x)  # the velocity that would step there
        with self.cast.play(STUDENT):
            v = student(x, sigma)
            here = spread(sigma, x)
            found, _ = self.target(x - here * v, x + (1 - here) * v, here, cap=self.config.error.weight_cap)
            target, weight = self.target(x - here * wanted, x + (1 - here) * wanted, here, cap=self.config.error.weight_cap)
            loss, figures = clip_error(found, target, weight, cells=self.cells, config=self.config.error)
            yield loss, {**figures, "liveliness": liveliness(x - here * v, clean)}

    @torch.no_grad()
    def _aim(self, x: Tensor, place: Tensor, end: Tensor, *, student: Velocity, teacher: Velocity) -> Tensor:
        """Where the path from x leads at the end of its step: the teacher goes `leap` steps, the student the rest."""
        path = self.path.to(x)
        for _ in range(min(self.config.leap, self.stride)):
            then = torch.minimum(place + 1, end)
            x = x + spread(path[then] - path[place], x) * teacher(x, path[place].clamp(min=1e-3))
            place = then
        if self.config.leap >= self.stride:
            return x
        return x + spread(path[end] - path[place], x) * student(x, path[place].clamp(min=1e-3))

    def _places(self, count: int, rng: torch.Generator) -> Tensor:
        """A point of the teacher's path per clip, the start of a sampling step or anywhere.  -> [B]"""
        draw = {"generator": rng, "device": rng.device}
        anywhere = torch.randint(len(self.path) - 1, (count,), **draw)
        begin = torch.rand(count, **draw) < self.config.start_share
        return torch.where(begin, anywhere // self.stride * self.stride, anywhere)


def teacher_path(sampler: SamplerConfig, teacher_steps: int) -> tuple[Tensor, int]:
    """Noise levels of the teacher, falling through those of the student, and how many of its steps make one of the student's.

    The teacher's own schedule where the student's is a part of it, else equal steps between the student's levels.
    """
    steps = sampler.sample_steps
    coarse = sigmas_of(sampler.schedule, steps, sampler.sample_shift)
    stride = max(1, round(teacher_steps / steps))
    if sampler.schedule not in FIXED_STEPS:
        fine = sigmas_of(sampler.schedule, steps * stride, sampler.sample_shift)
        if torch.allclose(fine[::stride], coarse):
            return fine, stride
    parts = [torch.linspace(float(a), float(b), stride + 1, dtype=coarse.dtype)[:-1] for a, b in pairwise(coarse)]
    return torch.cat((*parts, coarse[-1:])), stride
