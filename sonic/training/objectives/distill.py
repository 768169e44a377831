"""What all ways to fewer sampling steps share: the cast, what it is told, velocities of a role, and how lively films are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sonic.model.dit import AvatarDiT
from sonic.model.execution import LOCAL, Execution
from sonic.sampling.guidance import guidance
from sonic.sampling.path import velocity_from
from sonic.sampling.samplers import Velocity
from sonic.sampling.schedules import TIMESTEPS, sigmas_of
from sonic.training.objective_config import DistillConfig
from sonic.training.objectives import Objective
from sonic.training.objectives.flow_match import REACHES, TARGETS, cells_of, need_blocks
from sonic.training.objectives.networks import TEACHER, Make, cast_of
from sonic.training.train_config import TrainConfig
from sonic.types import Conditions, pick


class Distillation(Objective):
    """A student of few steps, the teacher it began as, and whoever else a way of learning needs."""

    def __init__(
        self, config: TrainConfig, dataset: object, learners: Sequence[str], *, make: Make = AvatarDiT, execution: Execution = LOCAL
    ) -> None:
        assert isinstance(config.objective, DistillConfig)
        self.config, self.model_config, sampler = config.objective, config.model, config.objective.sampler
        self.execution = execution
        if self.config.window.reach == "blocks":
            need_blocks(config, dataset)
        self.sigmas = sigmas_of(sampler.schedule, sampler.sample_steps, sampler.sample_shift)
        self.cast = cast_of(config.model, self.config.learn, (*learners, TEACHER), make=make)
        self.roles, self.facts = self.cast.roles, {**self.cast.facts, "sample_steps": str(sampler.sample_steps)}
        self.pretrained = tuple(self.cast.bodies.values())
        self.to_velocity = velocity_from(config.model.prediction)
        self.target = pick(TARGETS, config.model.prediction, "model.prediction")
        self.see = pick(REACHES, self.config.window.reach, "objective.window.reach")
        self.cells = cells_of(dataset, self.config.error)

    @property
    def bodies(self) -> Mapping[str, nn.Module]:
        """The transformers."""
        return self.cast.bodies

    def export(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The student's adapters in peft's format, or its transformer."""
        return self.cast.export(weights)

    def first_block(self, rng: torch.Generator) -> int:
        """Where in a film the window lies."""
        return int(torch.randint(self.config.window.max_first_block + 1, (), generator=rng, device=rng.device))

    def velocity(self, role: str, told: Conditions, first_block: int) -> Velocity:
        """The velocity of a window at once as `role` sees it; the teacher's is guided and gives no gradient."""
        if role != TEACHER:
            return self._plain(role, told, first_block)
        both = (self._plain(TEACHER, each, first_block) for each in (told.drop("audio"), told))
        return torch.no_grad()(guidance(next(both), self.config.teacher_guide_scale)(next(both)))

    def _plain(self, role: str, told: Conditions, first_block: int) -> Velocity:
        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            with self.cast.play(role) as model:
                place = {"first_block": first_block, "execution": self.execution}
                prediction = self.see(model, x, TIMESTEPS * sigma, told=told, **place).float()
            return self.to_velocity(prediction, x, sigma)

        return velocity


def liveliness(made: Tensor, truth: Tensor) -> Tensor:
    """How much latents change over time, as a share of what the truth's do: 1.0 = as lively, 0.0 = frozen."""
    size = lambda latents: latents.detach().float().std(dim=2).mean()  # noqa: E731
    return size(made) / size(truth).clamp(min=1e-6)
