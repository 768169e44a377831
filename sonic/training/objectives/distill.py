"""Base of the distillation objectives: networks, conditions, the (guided) velocity of a role, and a metric of motion."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sonic.sampling.guidance import guided_velocity
from sonic.sampling.path import expand_like, velocity_from
from sonic.sampling.samplers import Velocity
from sonic.sampling.schedules import sigmas_of
from sonic.training.objective_config import DistillConfig
from sonic.training.objectives.networks import STUDENT, TEACHER
from sonic.training.objectives.transformer import TransformerObjective
from sonic.training.train_config import TrainConfig
from sonic.types import Conditions


class Distillation(TransformerObjective):
    """A student with few sampling steps, the frozen teacher it starts from, and further roles that an objective needs."""

    config: DistillConfig
    learners: Sequence[str] = (STUDENT,)

    def build(self, config: TrainConfig, dataset: object) -> None:
        """Raises ValueError when the clips of the dataset do not fit the options."""
        sampler = self.config.sampler
        self.build_transformers(config, dataset, (*self.learners, TEACHER))
        self.metadata = {**self.metadata, "sample_steps": str(sampler.sample_steps)}
        self.sigmas = sigmas_of(sampler.schedule, sampler.sample_steps, sampler.sample_shift)
        self.to_velocity = velocity_from(config.model.prediction)

    def velocity(self, role: str, conditions: Conditions, first_block: int) -> Velocity:
        """The velocity function of `role` for a whole window; the teacher's uses guidance and no gradient."""
        if role != TEACHER:
            return self._plain(role, conditions, first_block)
        without_audio = self._plain(TEACHER, conditions.drop("audio"), first_block)
        with_audio = self._plain(TEACHER, conditions, first_block)
        return torch.no_grad()(guided_velocity(without_audio, with_audio, self.config.teacher_guide_scale))

    def head_prediction(self, x: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
        """What the model's head predicts where its velocity at x is this one."""
        return self.target(*path_ends(x, velocity, sigma), expand_like(sigma, x), cap=self.config.error.weight_cap)[0]

    def _plain(self, role: str, conditions: Conditions, first_block: int) -> Velocity:
        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            with self.networks.use_role(role) as model:
                prediction = self.predict(model, x, sigma, conditions=conditions, first_block=first_block)
            return self.to_velocity(prediction, x, sigma)

        return velocity


def path_ends(x: Tensor, velocity: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """The clean latents and the noise at the ends of the straight path through x at noise level sigma.  sigma [B]"""
    level = expand_like(sigma, x)
    return x - level * velocity, x + (1 - level) * velocity


def motion_ratio(generated: Tensor, truth: Tensor) -> Tensor:
    """Standard deviation of latents over time, relative to the true latents': 1.0 = equal motion, 0.0 = frozen."""
    size, true_size = (latents.detach().float().std(dim=2).mean() for latents in (generated, truth))
    return size / true_size.clamp(min=1e-6)
