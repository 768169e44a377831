"""Consistency distillation of a UNet that denoises windows, along the Karras levels of the teacher, whose guidance the student learns.

The phased form of consistency distillation (arXiv 2405.18407): from any point of the teacher's path the student goes in one step to the
next of its own few sampling levels, which are part of the path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from sonic.checkpoint.lora import PREFIX
from sonic.sampling.karras import RHO, karras_sigmas
from sonic.sampling.path import expand_like
from sonic.sampling.samplers import Velocity
from sonic.training.objective_config import SvdConsistencyConfig
from sonic.training.objectives.consistency import StepsOfPath, divided
from sonic.training.objectives.distill import motion_ratio
from sonic.training.objectives.networks import STUDENT, TEACHER
from sonic.training.objectives.objective import Batch, Losses
from sonic.training.objectives.svd_windows import WindowObjective, frames_of, noised, v_of, velocity_of
from sonic.training.train_config import TrainConfig
from sonic.types import upload

Row = tuple[float, float, float]  # of guidance: 1 or 0 for the picture, the same for the audio, and the weight


class SvdConsistency(StepsOfPath, WindowObjective):
    """Trains the student, the UNet with adapters or one of its own, against the frozen teacher; the networks of the sound are frozen."""

    config: SvdConsistencyConfig
    options = SvdConsistencyConfig
    keeps_changes = True

    def build(self, config: TrainConfig, dataset: object) -> None:
        """Raises ValueError when the clips of the dataset do not fit the options."""
        self.build_networks(config, dataset, (STUDENT, TEACHER))
        self.sound.requires_grad_(False)
        self.roles, steps = self.networks.roles, self.config.sample_steps
        self.metadata = {**self.networks.metadata, "sample_steps": str(steps)}
        self.stride = max(1, round(self.config.teacher_steps / steps))
        self.path = divided(karras_sigmas(steps), self.stride, power=RHO)

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """The UNets, and the networks of the sound."""
        return {**self.networks.modules, "sound": self.sound}

    def losses(self, role: str, batch: Batch, rng: torch.Generator) -> Losses:
        """Squared error, as of v, of the student's step.  batch: see WindowObjective"""
        clean = frames_of(batch)
        point, path = self._path_points(len(clean), rng), upload(self.path.to(clean.dtype), clean.device)
        end = (point // self.stride + 1) * self.stride
        sigma, last = path[point], path[end]
        x = noised(clean, torch.randn(clean.shape, generator=rng, device=rng.device), sigma)
        student = self._velocity(STUDENT, batch, [(1, 1, 1.0)])
        aim = self._aim(x, point, end, student=student, teacher=torch.no_grad()(self._velocity(TEACHER, batch, self.guidance_rows())))
        target = v_of((aim - x) / expand_like(last - sigma, x), x, sigma)  # whose step leads to `aim`
        every = clean.new_ones(len(clean))
        with self.networks.use_role(STUDENT) as model:
            v = self.predict(model, x, sigma, given=self.conditions(batch, every, every))
            loss, figures = self.error(v, target, sigma)
            moved = (self._clean(each, x, sigma) for each in (v, target))
            ratios = [motion_ratio(each, rearrange(clean, "b f c h w -> b c f h w")) for each in moved]
            yield loss, {**figures, "motion_ratio": ratios[0], "teacher/motion_ratio": ratios[1]}

    def export(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The student's adapters, or its whole UNet as tensors that replace others, and the changes that its teacher has."""
        whole = not self.config.learn.rank
        found = self.networks.export(super().export(weights))
        return {**self.changes, **{f"{PREFIX}{name}" if whole else name: tensor for name, tensor in found.items()}}

    def guidance_rows(self) -> Sequence[Row]:
        """u + g1·(d - u) + g2·(c - d), by weight, of nothing u, the picture d, and picture and audio c."""
        picture, audio = self.config.teacher_guide_scale, self.config.teacher_audio_guide_scale
        rows = [(0, 0, 1 - picture), (1, 0, picture - audio), (1, 1, audio)]
        return [row for row in rows if row[2]]

    def _velocity(self, role: str, batch: Batch, rows: Sequence[Row]) -> Velocity:
        """The velocity function of a role: the weighted sum of its predictions."""
        every = batch["latents"].new_ones(len(batch["latents"]))
        given = [(self.conditions(batch, image * every, audio * every), weight) for image, audio, weight in rows]

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            with self.networks.use_role(role) as model:
                v = sum(weight * self.predict(model, x, sigma, given=each) for each, weight in given)
            return velocity_of(v, x, sigma)

        return velocity

    def _clean(self, v: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """The clean latents of a prediction.  -> [B,4,F,h,w]"""
        return rearrange(x - expand_like(sigma, x) * velocity_of(v.detach(), x, sigma), "b f c h w -> b c f h w")
