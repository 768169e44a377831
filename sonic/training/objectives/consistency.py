"""Consistency distillation: from any point within a sampling step, the student goes in one step to the end of that step.

With one sampling step this is consistency distillation (arXiv 2303.01469), with several its phased form (arXiv 2405.18407); when
`leap` covers a whole step, the target is the teacher's alone (trajectory distillation). All blocks of a window have the same noise
level, so that a block-causal forward of the window equals the rollout, whose sampling steps have separate rings.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from sonic.config import SamplerConfig
from sonic.sampling.path import expand_like, interpolate
from sonic.sampling.samplers import Velocity
from sonic.sampling.schedules import sigmas_of
from sonic.training.objective_config import ConsistencyConfig, SvdConsistencyConfig
from sonic.training.objectives.distill import Distillation, motion_ratio, path_ends
from sonic.training.objectives.networks import STUDENT, TEACHER
from sonic.training.objectives.objective import Batch, Losses, host_rng
from sonic.training.objectives.transformer import conditions_of
from sonic.training.train_config import TrainConfig
from sonic.types import upload


class StepsOfPath:
    """Points of the teacher's falling `path` of noise levels, `stride` steps to one of the student's, and the student's targets there."""

    config: ConsistencyConfig | SvdConsistencyConfig
    path: Tensor
    stride: int

    @torch.no_grad()
    def _aim(self, x: Tensor, point: Tensor, end: Tensor, *, student: Velocity, teacher: Velocity) -> Tensor:
        """The latents at the end of the student's sampling step: `leap` steps of the teacher from x, then one of the student."""
        path = upload(self.path.to(x.dtype), x.device)
        for _ in range(min(self.config.leap, self.stride)):
            then = torch.minimum(point + 1, end)
            x = x + expand_like(path[then] - path[point], x) * teacher(x, path[point].clamp(min=1e-3))
            point = then
        if self.config.leap >= self.stride:
            return x
        return x + expand_like(path[end] - path[point], x) * student(x, path[point].clamp(min=1e-3))

    def _path_points(self, count: int, rng: torch.Generator) -> Tensor:
        """A random point of the teacher's path per clip: the start of a student's step, or any point.  -> [B]"""
        draw = {"generator": rng, "device": rng.device}
        anywhere = torch.randint(len(self.path) - 1, (count,), **draw)
        begin = torch.rand(count, **draw) < self.config.start_share
        return torch.where(begin, anywhere // self.stride * self.stride, anywhere)


class Consistency(StepsOfPath, Distillation):
    """Trains the student against the frozen teacher."""

    config: ConsistencyConfig
    options = ConsistencyConfig

    def build(self, config: TrainConfig, dataset: object) -> None:
        """Raises ValueError when the clips of the dataset do not fit the options."""
        super().build(config, dataset)
        self.path, self.stride = teacher_path(self.config.sampler, self.config.teacher_steps)

    def losses(self, role: str, batch: Batch, rng: torch.Generator) -> Losses:
        """Weighted error of the student's step, in terms of its head's prediction.  batch: see FlowMatch.losses"""
        clean = batch["latents"]
        conditions, first_block = conditions_of(batch, self.model_config), self.first_block(host_rng(rng))
        point = self._path_points(clean.shape[0], rng)
        path = upload(self.path.to(clean.dtype), clean.device)
        end = (point // self.stride + 1) * self.stride
        sigma, last = path[point], path[end]
        x = interpolate(clean, torch.randn(clean.shape, generator=rng, device=rng.device), sigma)
        student = self.velocity(STUDENT, conditions, first_block)
        aim = self._aim(x, point, end, student=student, teacher=self.velocity(TEACHER, conditions, first_block))
        aim_velocity = (aim - x) / expand_like(last - sigma, x)  # the velocity that leads to `aim` in one step
        with self.networks.use_role(STUDENT):
            v = student(x, sigma)
            prediction = self.head_prediction(x, v, sigma)
            aimed = path_ends(x, aim_velocity, sigma)
            loss, figures = self.error(prediction, *aimed, sigma=sigma)
            student_clean, _ = path_ends(x, v, sigma)
            motion = {"motion_ratio": motion_ratio(student_clean, clean), "teacher/motion_ratio": motion_ratio(aimed[0], clean)}
            yield loss, {**figures, **motion}


def teacher_path(sampler: SamplerConfig, teacher_steps: int) -> tuple[Tensor, int]:
    """Falling noise levels of the teacher, which include those of the student, and the number of teacher steps per student step.

    The sampling schedule itself when it contains the student's levels, else equal steps between the student's levels.
    """
    steps = sampler.sample_steps
    coarse = sigmas_of(sampler.schedule, steps, sampler.sample_shift)
    stride = max(1, round(teacher_steps / steps))
    fine = sigmas_of(sampler.schedule, steps * stride, sampler.sample_shift)
    if torch.allclose(fine[::stride], coarse):
        return fine, stride
    return divided(coarse, stride), stride


def divided(coarse: Tensor, stride: int, *, power: float = 1.0) -> Tensor:
    """Levels with `stride` steps, equal in level^(1/power), in the place of each step of `coarse`.  [N+1] -> [N·stride+1]"""
    roots = [float(level) ** (1 / power) for level in coarse]
    fine = torch.cat([torch.linspace(a, b, stride + 1, dtype=torch.float64)[:-1] for a, b in pairwise(roots)] + [torch.zeros(1)])
    found = (fine**power).to(coarse.dtype)
    found[::stride] = coarse
    return found
