"""Distribution matching distillation on the student's own rollouts, which use KV rings as inference does.

A critic learns the distribution of the student's videos; the difference between the critic's and the teacher's denoising of a noised
video is the student's gradient (DMD2, arXiv 2405.14867; self forcing, arXiv 2506.08009). It is backpropagated block by block with
detached keys and values, so that memory holds the graph of one block, whatever the length of the video.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sonic.geometry import BlockSpan
from sonic.model.dit import AvatarDiT
from sonic.model.execution import LOCAL, BlockInputs, Execution
from sonic.sampling.path import interpolate
from sonic.sampling.schedules import TIMESTEPS
from sonic.training.objective_config import DmdConfig
from sonic.training.objectives.distill import Distillation, motion_ratio, path_ends
from sonic.training.objectives.networks import CRITIC, STUDENT, TEACHER
from sonic.training.objectives.objective import Batch, Figure, Losses, host_rng
from sonic.training.objectives.transformer import by_noise_level, check_whole_blocks, conditions_of
from sonic.training.train_config import TrainConfig
from sonic.types import Conditions, upload


class Start(NamedTuple):
    """Start of a rollout: conditions, noise [B,C,T,h,w], index of the first block, and the true latents if that block is given."""

    conditions: Conditions
    noise: Tensor
    first_block: int
    anchor: Tensor | None


class Rolled(NamedTuple):
    """A rollout by sampling step: the latents before the step, and the clean latents predicted in it; [B,C,T,h,w] each."""

    before: list[Tensor]
    clean: list[Tensor]


class DistributionMatching(Distillation):
    """Trains the student and the critic, the critic more often."""

    config: DmdConfig
    learners = (STUDENT, CRITIC)

    def build(self, config: TrainConfig, dataset: object) -> None:
        """Raises ValueError when the clips of the dataset do not fit the options."""
        check_whole_blocks(config, dataset)  # the student rolls out by blocks, whatever the teacher's attention span
        super().build(config, dataset)
        self.rates = {CRITIC: self.config.critic_rate}

    def roles_in_step(self, step: int) -> Sequence[str]:
        """The critic several times, then the student."""
        return (*(CRITIC,) * self.config.critic_turns, STUDENT)

    def losses(self, role: str, batch: Batch, rng: torch.Generator) -> Losses:
        """Loss of the critic on a video of the student, or distribution matching loss of the student.  batch: see FlowMatch.losses"""
        host = host_rng(rng)
        start = self._start(batch, rng, host)
        step = int(torch.randint(len(self.sigmas) - 1, (), generator=host))
        with self.networks.use_role(STUDENT) as model, torch.no_grad():
            rolled = roll(model, start, self.sigmas, execution=self.execution)
        learn = self._critic if role == CRITIC else self._student
        yield from learn(start, rolled, step=step, batch=batch, rng=rng)

    def _start(self, batch: Batch, rng: torch.Generator, host: torch.Generator) -> Start:
        clean = batch["latents"]
        noise = torch.randn(clean.shape, generator=rng, device=rng.device)
        anchored = bool(torch.rand((), generator=host) < self.config.anchor_share)
        return Start(conditions_of(batch, self.model_config), noise, self.first_block(host), clean if anchored else None)

    def _noised(self, clean: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Noise each clip to a random level of its own: (noisy, noise, sigma [B])."""
        low, high = self.config.lowest, self.config.highest
        sigma = low + (high - low) * torch.rand(clean.shape[0], generator=rng, device=rng.device)
        noise = torch.randn(clean.shape, generator=rng, device=rng.device)
        return interpolate(clean, noise, sigma), noise, sigma

    def _critic(self, start: Start, rolled: Rolled, *, step: int, batch: Batch, rng: torch.Generator) -> Losses:
        generated = rolled.clean[step]
        noisy, noise, sigma = self._noised(generated, rng)
        with self.networks.use_role(CRITIC):
            v = self.velocity(CRITIC, start.conditions, start.first_block)(noisy, sigma)
            yield self.error(self.head_prediction(noisy, v, sigma), generated, noise, sigma=sigma)

    def _student(self, start: Start, rolled: Rolled, *, step: int, batch: Batch, rng: torch.Generator) -> Losses:
        generated = rolled.clean[step]
        gradient, figures = self._gradient(start, generated, rng)
        figures["motion_ratio"] = motion_ratio(rolled.clean[-1], batch["latents"])
        with self.networks.use_role(STUDENT) as model:
            blocks = BlockByBlock(model, start, self.execution)
            for index, part in enumerate(blocks.parts):
                clean = blocks.clean(rolled.before[step][:, :, part], blocks.inputs(index), self.sigmas[step])
                aim = (clean - gradient[:, :, part]).detach()
                yield 0.5 * (clean - aim).square().sum() / generated.numel(), figures

    @torch.no_grad()
    def _gradient(self, start: Start, generated: Tensor, rng: torch.Generator) -> tuple[Tensor, dict[str, Figure]]:
        """The DMD gradient: the critic's minus the teacher's clean prediction, normalised by the teacher's mean error; and what is logged
        of it.  [B,C,T,h,w]"""
        noisy, _, sigma = self._noised(generated, rng)
        critic, teacher = (self.velocity(role, start.conditions, start.first_block)(noisy, sigma) for role in (CRITIC, TEACHER))
        (fake, fake_noise), (real, real_noise) = path_ends(noisy, critic, sigma), path_ends(noisy, teacher, sigma)
        size = (generated - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True).clamp(min=1e-6)
        gradient = (fake - real) / size * upload(self.cell_weights, fake.device)
        if start.anchor is not None:
            gradient[:, :, : self.model_config.rollout.block_frames] = 0  # the true block gets none, but later blocks read its keys
        losses = 0.5 * gradient.square().mean(dim=(1, 2, 3, 4))
        figures = {"dmd_gradient_rms": rms(gradient), "dmd_normaliser": size.mean(), **by_noise_level(losses, sigma)}
        return gradient, figures | compare_scores(fake_noise, real_noise)


def compare_scores(fake: Tensor, real: Tensor) -> dict[str, Tensor]:
    """Sizes, distance and mean cosine of the scores of critic and teacher, in terms of the noise that they see, which is -sigma · score."""
    cosine = F.cosine_similarity(fake.flatten(1), real.flatten(1)).mean()
    sizes = {"critic/score_rms": rms(fake), "teacher/score_rms": rms(real)}
    return {**sizes, "score_difference_rms": rms(fake - real), "score_cosine": cosine}


def rms(values: Tensor) -> Tensor:
    """Root mean square: a norm that does not grow with the number of values."""
    return values.float().square().mean().sqrt()


class BlockByBlock:
    """A transformer's forward passes over the blocks of a video, in turn, at one noise level: with one ring of keys and values."""

    def __init__(self, model: AvatarDiT, start: Start, execution: Execution) -> None:
        self.model, self.start, self.execution = model, start, execution
        self.block, frames = model.config.rollout.block_frames, start.noise.shape[2]
        assert frames % self.block == 0, (frames, self.block)
        self.parts = [slice(first, first + self.block) for first in range(0, frames, self.block)]
        cache = model.new_cache(start.conditions, steps=1, execution=execution)
        self.cache = model.prefill(start.conditions, cache, execution=execution)

    def inputs(self, index: int) -> BlockInputs:
        """What the model gets of a block's conditions."""
        here, there = (BlockSpan(number, number * self.block, self.block) for number in (index, self.start.first_block + index))
        return self.model.prepare_block(self.start.conditions.at(here), there)

    def clean(self, x: Tensor, inputs: BlockInputs, sigma: Tensor) -> Tensor:
        """The clean latents that the model predicts for a block at noise level `sigma`."""
        timestep = TIMESTEPS * torch.full((x.shape[0],), float(sigma), device=x.device)
        ring = self.cache.rings[0]
        prediction = self.model.denoise_block(x, timestep, inputs, cache=self.cache, ring=ring, execution=self.execution)
        return prediction if self.model.config.prediction == "clean" else x - float(sigma) * prediction


def roll(model: AvatarDiT, start: Start, sigmas: Tensor, *, execution: Execution = LOCAL) -> Rolled:
    """The rollout of inference with Euler steps, and all its intermediate latents.

    A block at step i attends only to earlier blocks at step i, so a video of known length can be generated step by step instead of
    block by block, with one ring for all steps. In an anchored rollout the first block is the true one, noised to the level of each
    step.
    """
    blocks = BlockByBlock(model, start, execution)
    inputs = [blocks.inputs(index) for index in range(len(blocks.parts))]
    rolled, latents, given = Rolled([], []), start.noise, blocks.parts[0]
    for now, then in pairwise(sigmas):
        blocks.cache.rings[0].rewind()
        if start.anchor is not None:
            noised = interpolate(start.anchor[:, :, given], start.noise[:, :, given], now.float().expand(latents.shape[0]))
            latents = torch.cat((noised, latents[:, :, given.stop :]), dim=2)
        clean = torch.cat([blocks.clean(latents[:, :, part], each, now) for part, each in zip(blocks.parts, inputs, strict=True)], dim=2)
        if start.anchor is not None:
            clean[:, :, given] = start.anchor[:, :, given]
        rolled.before.append(latents)
        rolled.clean.append(clean)
        latents = latents + (float(then) - float(now)) * ((latents - clean) / float(now))
    return rolled
