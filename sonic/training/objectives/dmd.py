"""Distribution matching on the student's own rollouts: over KV rings as inference runs, one step of all blocks after the other.

A critic learns where the student's films lie, the teacher knows where films should, and the difference of what the two make of a
noised film moves the student (DMD2, arXiv 2405.14867; self forcing, arXiv 2506.08009). The gradient is taken block by block over
detached keys and values, so that one block's graph at a time is held, whatever the length of the film.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from sonic.geometry import BlockSpan
from sonic.model.dit import AvatarDiT
from sonic.model.execution import LOCAL, Execution
from sonic.model.kv_cache import KVCache
from sonic.model.trunk_inputs import BlockInputs
from sonic.sampling.path import interpolate, spread
from sonic.sampling.schedules import TIMESTEPS
from sonic.training.objective_config import DmdConfig
from sonic.training.objectives import Batch, Losses
from sonic.training.objectives.distill import Distillation, liveliness
from sonic.training.objectives.flow_match import clip_error, conditions_of, need_blocks
from sonic.training.objectives.networks import CRITIC, STUDENT, TEACHER, Make
from sonic.training.train_config import TrainConfig
from sonic.types import Conditions


class Start(NamedTuple):
    """What a rollout begins from: what it is told, noise [B,C,T,h,w], its first block, and the truth when that block is given."""

    told: Conditions
    noise: Tensor
    first_block: int
    anchor: Tensor | None


class Rolled(NamedTuple):
    """A rollout by sampling step: latents before the step, and the clean latents that the step saw in them; [B,C,T,h,w] each."""

    before: list[Tensor]
    clean: list[Tensor]


class DistributionMatching(Distillation):
    """Student and critic learn, the critic more often."""

    config: DmdConfig

    def __init__(self, config: TrainConfig, dataset: object = None, *, make: Make = AvatarDiT, execution: Execution = LOCAL) -> None:
        need_blocks(config, dataset)  # whatever reach the teacher has, the student rolls out
        super().__init__(config, dataset, (STUDENT, CRITIC), make=make, execution=execution)
        self.rates = {CRITIC: self.config.critic_rate}

    def turn(self, step: int) -> Sequence[str]:
        """The critic's updates, then the student's."""
        return (*(CRITIC,) * self.config.critic_turns, STUDENT)

    def losses(self, role: str, batch: Batch, rng: torch.Generator) -> Losses:
        """The critic's error on a film of the student, or the student's way to the teacher.  batch: see FlowMatch.losses"""
        start = self._start(batch, rng)
        step = int(torch.randint(len(self.sigmas) - 1, (), generator=rng, device=rng.device))
        with self.cast.play(STUDENT) as model, torch.no_grad():
            rolled = roll(model, start, self.sigmas, execution=self.execution)
        learn = self._critic if role == CRITIC else self._student
        yield from learn(start, rolled, step=step, batch=batch, rng=rng)

    def _start(self, batch: Batch, rng: torch.Generator) -> Start:
        clean = batch["latents"]
        noise = torch.randn(clean.shape, generator=rng, device=rng.device)
        anchored = bool(torch.rand((), generator=rng, device=rng.device) < self.config.anchor_share)
        return Start(conditions_of(batch, self.model_config), noise, self.first_block(rng), clean if anchored else None)

    def _noised(self, clean: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Clean latents, each clip at a noise level of its own: (noisy, noise, sigma [B])."""
        low, high = self.config.lowest, self.config.highest
        sigma = low + (high - low) * torch.rand(clean.shape[0], generator=rng, device=rng.device)
        noise = torch.randn(clean.shape, generator=rng, device=rng.device)
        return interpolate(clean, noise, sigma), noise, sigma

    def _critic(self, start: Start, rolled: Rolled, *, step: int, batch: Batch, rng: torch.Generator) -> Losses:
        made = rolled.clean[step]
        noisy, noise, sigma = self._noised(made, rng)
        level, cap = spread(sigma, made), self.config.error.weight_cap
        with self.cast.play(CRITIC):
            v = self.velocity(CRITIC, start.told, start.first_block)(noisy, sigma)
            found, _ = self.target(noisy - level * v, noisy + (1 - level) * v, level, cap=cap)
            target, weight = self.target(made, noise, level, cap=cap)
            yield clip_error(found, target, weight, cells=self.cells, config=self.config.error)

    def _student(self, start: Start, rolled: Rolled, *, step: int, batch: Batch, rng: torch.Generator) -> Losses:
        made = rolled.clean[step]
        pull = self._pull(start, made, rng)
        figures = {"pull": pull.abs().mean(), "liveliness": liveliness(rolled.clean[-1], batch["latents"])}
        block = self.model_config.rollout.block_frames
        if start.anchor is not None:
            pull[:, :, :block] = 0  # the truth needs no push, but its keys are read by the others
        with self.cast.play(STUDENT) as model:
            cache = _cache(model, start, self.execution)
            for index, part in enumerate(_parts(made.shape[2], block)):
                inputs = _inputs(model, start, index)
                clean = _clean(
                    model, rolled.before[step][:, :, part], inputs, cache=cache, sigma=self.sigmas[step], execution=self.execution
                )
                aim = (clean - pull[:, :, part]).detach()
                yield 0.5 * (clean - aim).square().sum() / made.numel(), figures

    @torch.no_grad()
    def _pull(self, start: Start, made: Tensor, rng: torch.Generator) -> Tensor:
        """Where the critic sees the film less where the teacher sees it, in units of the teacher's distance from it."""
        noisy, _, sigma = self._noised(made, rng)
        level = spread(sigma, made)
        fake, real = (noisy - level * self.velocity(role, start.told, start.first_block)(noisy, sigma) for role in (CRITIC, TEACHER))
        size = (made - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True).clamp(min=1e-6)
        pull = (fake - real) / size
        return pull if self.cells is None else pull * self.cells.to(pull)


def roll(model: AvatarDiT, start: Start, sigmas: Tensor, *, execution: Execution = LOCAL) -> Rolled:
    """The rollout that inference makes with Euler steps, and what it passed through.

    A block at step i hears only what the blocks before it were at step i, so a film of known length is made step by step instead of
    block by block and one ring serves all steps. An anchored rollout begins with the truth: its first block is at every step what
    the noised truth is there.
    """
    parts = _parts(start.noise.shape[2], model.config.rollout.block_frames)
    cache = _cache(model, start, execution)
    inputs = [_inputs(model, start, index) for index in range(len(parts))]
    rolled, film, given = Rolled([], []), start.noise, parts[0]
    for now, then in pairwise(sigmas):
        cache.rings[0].rewind()
        if start.anchor is not None:
            noised = interpolate(start.anchor[:, :, given], start.noise[:, :, given], now.float().expand(film.shape[0]))
            film = torch.cat((noised, film[:, :, given.stop :]), dim=2)
        level = {"cache": cache, "sigma": now, "execution": execution}
        seen = [_clean(model, film[:, :, part], each, **level) for part, each in zip(parts, inputs, strict=True)]
        clean = torch.cat(seen, dim=2)
        if start.anchor is not None:
            clean[:, :, given] = start.anchor[:, :, given]
        rolled.before.append(film)
        rolled.clean.append(clean)
        film = film + (float(then) - float(now)) * ((film - clean) / float(now))
    return rolled


def _cache(model: AvatarDiT, start: Start, execution: Execution) -> KVCache:
    """A cache with one ring that holds reference, motion and prompt."""
    return model.prefill(start.told, model.new_cache(start.told, steps=1, execution=execution), execution=execution)


def _clean(model: AvatarDiT, x: Tensor, inputs: BlockInputs, *, cache: KVCache, sigma: Tensor, execution: Execution) -> Tensor:
    """The clean latents that the model sees in a block at noise level `sigma`; the cache has one ring."""
    level = torch.full((x.shape[0],), float(sigma), device=x.device)
    found = model.denoise_block(x, TIMESTEPS * level, inputs, cache=cache, ring=cache.rings[0], execution=execution)
    return found if model.config.prediction == "clean" else x - float(sigma) * found


def _inputs(model: AvatarDiT, start: Start, index: int) -> BlockInputs:
    block = model.config.rollout.block_frames
    here, there = (BlockSpan(number, number * block, block) for number in (index, start.first_block + index))
    return model.prepare_block(start.told.at(here), there)


def _parts(frames: int, block: int) -> list[slice]:
    assert frames % block == 0, (frames, block)
    return [slice(first, first + block) for first in range(0, frames, block)]
