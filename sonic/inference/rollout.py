"""Samples clean latents from noise: block by block as an iterator, or a whole clip at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import count, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from sonic.config import SamplerConfig
from sonic.geometry import BlockSpan
from sonic.inference.forwards import open_forwards
from sonic.inference.live_features import LiveConditions
from sonic.model.dit import AvatarDiT
from sonic.model.execution import LOCAL, BlockInputs, Execution, ForwardRequest
from sonic.parallel.context import DistributedContext
from sonic.sampling.guidance import guided, guided_velocity
from sonic.sampling.path import velocity_from
from sonic.sampling.samplers import SAMPLERS, Query, SamplerCoroutine, Velocity, answer_all
from sonic.sampling.schedules import TIMESTEPS, sigmas_of
from sonic.types import Conditions, LatentBlock, pick, upload


class NoiseSource(NamedTuple):
    """The random inputs of a rollout: a generator, and optional overrides.

    `noise(span)` replaces the noise of a block; `ref_positions(span, count)` gives the time id of the reference for each of the `count`
    forwards of a block (default: the configured rule).
    """

    generator: torch.Generator
    noise: Callable[[BlockSpan], Tensor] | None = None
    ref_positions: Callable[[BlockSpan, int], list[int]] | None = None


def seeded(seed: int) -> torch.Generator:
    """A new generator with this seed, on the CPU, so that it draws the same everywhere."""
    return torch.Generator().manual_seed(seed)


OnStep = Callable[[int, int, float], None]  # called after a step with (block or 0, sampling step, timestep 0..1000)


class Sampling(NamedTuple):
    """How latents are sampled: sampler and schedule, random inputs, unguided conditions, and a callback.

    `unconditional` are the conditions of the unguided forward (default: the same conditions without audio); `on_step` is called after
    every sampling step.
    """

    sampler: SamplerConfig
    source: NoiseSource
    unconditional: Conditions | None = None
    on_step: OnStep | None = None


def reporting(coroutine: SamplerCoroutine, steps: Sequence[int], report: Callable[[int, float], None]) -> SamplerCoroutine:
    """A sampler that answers like `coroutine` and reports each finished sampling step, with the timestep at which it began.

    `steps` holds the sampling step of each query, in order. A step begins with the last query that belongs to it.
    """
    begun, velocity = None, None
    for index in count():
        try:
            query = coroutine.send(velocity)
        except StopIteration as end:
            report(*begun)
            return end.value
        if query.step not in steps[index + 1 :]:
            if begun:
                report(*begun)
            begun = query.step, TIMESTEPS * query.sigma
        velocity = yield query


@torch.no_grad()
def rollout(
    model: AvatarDiT,
    conditions: Conditions,
    spans: Iterable[BlockSpan],
    *,
    sampling: Sampling,
    context: DistributedContext | None = None,
) -> Iterator[LatentBlock]:
    """Yield blocks of clean latents in order, each as soon as it is finished; memory does not grow with the number of blocks.

    The scheduler of `context` limits the number of forwards in flight (default: one, on this device). Forwards of older blocks are
    submitted first. A block may run a sampling step once the block before it has submitted its last forward of that step.
    """
    scale = sampling.sampler.sample_guide_scale
    condition_sets = (conditions,) if scale == 1 else (sampling.unconditional or conditions.drop("audio"), conditions)
    plan = _RolloutPlan(model, condition_sets, sampling)
    in_flight: deque[_BlockState] = deque()  # one entry per request, in the order in which they were submitted
    blocks: list[_BlockState] = []  # unfinished blocks, oldest first
    remaining, live = iter(spans), isinstance(conditions, LiveConditions)
    with closing(open_forwards(context or DistributedContext(), model, condition_sets, steps=len(plan.sigmas) - 1)) as forwards:
        while True:
            spans_now = iter(()) if live and in_flight else remaining  # live sound: finish what is in flight before waiting for more sound
            while (block := plan.next_block(blocks, spans_now)) and all(map(forwards.accepts, block.requests)):
                for request in block.take_requests():
                    forwards.submit(request)
                    in_flight.append(block)
                if live:
                    break
            if not in_flight:
                return
            for prediction in forwards.collect():
                block = in_flight.popleft()
                if (clean := block.advance(prediction, scale)) is not None:
                    blocks.remove(block)
                    yield LatentBlock(clean, block.span)


@torch.no_grad()
def sample_clip(
    model: AvatarDiT,
    conditions: Conditions,
    latent_frames: int,
    *,
    sampling: Sampling,
    execution: Execution = LOCAL,
) -> Tensor:
    """Sample the clean latents [B,C,latent_frames,H,W] of one clip with full attention, as Wan2.2-S2V does."""
    config, source, unconditional, on_step = sampling
    conditions, unconditional = (each and each.to(device=conditions.ref.device) for each in (conditions, unconditional))
    sigmas = sigmas_of(config.schedule, config.sample_steps, config.sample_shift)
    sampler = pick(SAMPLERS, config.name, "sampler.name")
    coroutine = sampler.coroutine(_noise(conditions.ref, latent_frames, source.generator), sigmas, source.generator)
    if on_step:
        coroutine = reporting(coroutine, sampler.steps_queried(len(sigmas) - 1), partial(on_step, 0))
    unguided = _clip_velocity(model, unconditional or conditions.drop("audio"), execution)
    velocity = guided_velocity(unguided, _clip_velocity(model, conditions, execution), config.sample_guide_scale)
    return answer_all(coroutine, velocity)


class _RolloutPlan:
    """What all blocks of a rollout share: the noise levels, the sampler, and the sampling step of each query of a block, in order.

    Each sampling step has its own KV ring, so a block attends to the earlier blocks at its own noise level.
    """

    def __init__(self, model: AvatarDiT, conditions: Sequence[Conditions], sampling: Sampling) -> None:
        self.model, self.conditions, self.source, sampler = model, conditions, sampling.source, sampling.sampler
        self.sigmas = sigmas_of(sampler.schedule, sampler.sample_steps, sampler.sample_shift)
        self.sampler = pick(SAMPLERS, sampler.name, "sampler.name")
        self.to_velocity = velocity_from(model.config.prediction)
        self.steps = self.sampler.steps_queried(len(self.sigmas) - 1)
        self.on_step = sampling.on_step

    def next_block(self, blocks: list[_BlockState], remaining: Iterator[BlockSpan]) -> _BlockState | None:
        """The oldest block with requests that may be submitted now, or a new block from `remaining`; None if there is neither."""
        for previous, block in pairwise([None, *blocks]):
            if block.requests and self._previous_is_past(previous, block.submitted):
                return block
        span = next(remaining, None) if self._previous_is_past(blocks[-1] if blocks else None, 0) else None
        if span is None:
            return None
        blocks.append(_BlockState(self, span))
        return blocks[-1]

    def _previous_is_past(self, previous: _BlockState | None, query: int) -> bool:
        """Whether the previous block has submitted its last query at the sampling step of the query with this index."""
        return previous is None or self.steps[query] not in self.steps[previous.submitted :]


class _BlockState:
    """A block that is being sampled: its sampler coroutine, the current query, and the forwards that the query needs.

    `submitted` is the number of queries whose forwards were submitted.
    """

    def __init__(self, plan: _RolloutPlan, span: BlockSpan) -> None:
        self.plan, self.span, self.submitted = plan, span, 0
        source, ref, forwards = plan.source, plan.conditions[0].ref, len(plan.steps) * len(plan.conditions)
        noise = source.noise(span) if source.noise else _noise(ref, span.latent_frames, source.generator)
        given = source.ref_positions
        self.ref_positions = given(span, forwards) if given else [plan.model.ref_position(span.start)] * forwards
        self.inputs: list[BlockInputs] = [plan.model.prepare_block(each.at(span).to(device=ref.device), span) for each in plan.conditions]
        self.coroutine = plan.sampler.coroutine(noise, plan.sigmas, source.generator)
        if plan.on_step:
            self.coroutine = reporting(self.coroutine, plan.steps, partial(plan.on_step, span.index))
        self.query: Query = next(self.coroutine)
        self.requests = self._requests()
        self.velocities: list[Tensor] = []

    def take_requests(self) -> list[ForwardRequest]:
        """The forwards of the current query, the unguided one first. A second call before `advance` gives none."""
        requests, self.requests = self.requests, []
        self.submitted += 1
        return requests

    def advance(self, prediction: Tensor, scale: float) -> Tensor | None:
        """Add the prediction of one forward; when all forwards of the query are back, advance the sampler.

        Returns the clean latents after the last step, else None.
        """
        self.velocities.append(self.plan.to_velocity(prediction, self.query.x, self.query.level))
        if len(self.velocities) < len(self.inputs):
            return None
        velocity = guided(*self.velocities, scale) if len(self.velocities) == 2 else self.velocities[0]
        self.velocities = []
        try:
            self.query = self.coroutine.send(velocity)
        except StopIteration as end:
            return end.value
        self.requests = self._requests()
        return None

    def _requests(self) -> list[ForwardRequest]:
        x, timestep = self.query.x, TIMESTEPS * self.query.level
        positions = self.ref_positions[self.submitted * len(self.inputs) :]
        inputs = [each._replace(ref_position=positions[index]) for index, each in enumerate(self.inputs)]
        return [ForwardRequest(x, timestep, each, index, self.query.step) for index, each in enumerate(inputs)]


def _clip_velocity(model: AvatarDiT, conditions: Conditions, execution: Execution) -> Velocity:
    to_velocity = velocity_from(model.config.prediction)
    return lambda x, sigma: to_velocity(model(x, TIMESTEPS * sigma, conditions, execution=execution), x, sigma)


def _noise(like: Tensor, latent_frames: int, generator: torch.Generator) -> Tensor:
    """Float32 noise on the device of `like`, drawn on the device of the generator, so that a seed gives the same noise on any device."""
    batch, channels, _, height, width = like.shape
    drawn = torch.randn(batch, channels, latent_frames, height, width, generator=generator, device=generator.device)
    return upload(drawn, like.device)
