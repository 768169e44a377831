"""Base of the distillation objectives: networks, conditions, the (guided) velocity of a role, and a metric of motion."""

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
from sonic.training.objectives.flow_match import TARGETS, WINDOW_FORWARDS, cells_of, need_blocks
from sonic.training.objectives.networks import TEACHER, Make, build_networks
from sonic.training.train_config import TrainConfig
from sonic.types import Conditions, pick


class Distillation(Objective):
    """A student with few sampling steps, the frozen teacher it starts from, and further roles that an objective needs."""

    def __init__(
        self, config: TrainConfig, dataset: object, learners: Sequence[str], *, make: Make = AvatarDiT, execution: Execution = LOCAL
    ) -> None:
        assert isinstance(config.objective, DistillConfig)
        self.config, self.model_config, sampler = config.objective, config.model, config.objective.sampler
        self.execution = execution
        if self.config.window.reach == "blocks":
            need_blocks(config, dataset)
        self.sigmas = sigmas_of(sampler.schedule, sampler.sample_steps, sampler.sample_shift)
        self.networks = build_networks(config.model, self.config.learn, (*learners, TEACHER), make=make)
        self.roles, self.metadata = self.networks.roles, {**self.networks.metadata, "sample_steps": str(sampler.sample_steps)}
        self.pretrained = tuple(self.networks.modules.values())
        self.to_velocity = velocity_from(config.model.prediction)
        self.target = pick(TARGETS, config.model.prediction, "model.prediction")
        self.run_window = pick(WINDOW_FORWARDS, self.config.window.reach, "objective.window.reach")
        self.cells = cells_of(dataset, self.config.error)

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """All transformers, by role."""
        return self.networks.modules

    def export(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The student's adapters in peft's format, or its transformer."""
        return self.networks.export(weights)

    def first_block(self, rng: torch.Generator) -> int:
        """A random position of the window in a video, in blocks."""
        return int(torch.randint(self.config.window.max_first_block + 1, (), generator=rng, device=rng.device))

    def velocity(self, role: str, conditions: Conditions, first_block: int) -> Velocity:
        """The velocity function of `role` for a whole window; the teacher's uses guidance and no gradient."""
        if role != TEACHER:
            return self._plain(role, conditions, first_block)
        both = (self._plain(TEACHER, c, first_block) for c in (conditions.drop("audio"), conditions))
        return torch.no_grad()(guidance(next(both), self.config.teacher_guide_scale)(next(both)))

    def _plain(self, role: str, conditions: Conditions, first_block: int) -> Velocity:
        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            with self.networks.use_role(role) as model:
                position = {"first_block": first_block, "execution": self.execution}
                prediction = self.run_window(model, x, TIMESTEPS * sigma, conditions=conditions, **position).float()
            return self.to_velocity(prediction, x, sigma)

        return velocity


def motion_ratio(generated: Tensor, truth: Tensor) -> Tensor:
    """Standard deviation of latents over time, relative to the true latents': 1.0 = equal motion, 0.0 = frozen."""
    size = lambda latents: latents.detach().float().std(dim=2).mean()  # noqa: E731
    return size(generated) / size(truth).clamp(min=1e-6)
