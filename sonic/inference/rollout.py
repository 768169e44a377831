"""Samples clean latents from noise: block by block as an iterator, or a whole clip at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sonic.config import SamplerConfig
from sonic.inference.forwards import open_forwards
from sonic.inference.live_features import LiveConditions
from sonic.model.dit import AvatarDiT
from sonic.model.execution import LOCAL, BlockInputs, Execution, ForwardRequest
from sonic.parallel.parallelize import DistributedContext
from sonic.sampling.guidance import guidance
from sonic.sampling.path import velocity_from
from sonic.sampling.samplers import SAMPLERS, Query, Velocity
from sonic.sampling.schedules import TIMESTEPS, sigmas_of
from sonic.types import BlockSpan, Conditions, LatentBlock, pick


class NoiseSource(NamedTuple):
    """The random inputs of a rollout: a generator, and optional overrides.

    `noise(span)` replaces the noise of a block; `ref_positions(span, count)` gives the time id of the reference for each of the `count`
    forwards of a block (default: the configured rule).
    """

    generator: torch.Generator
    noise: Callable[[BlockSpan], Tensor] | None = None
    ref_positions: Callable[[BlockSpan, int], list[int]] | None = None


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


class StepReporter:
    """Counts the queries of a sampler and reports each finished sampling step, with the timestep at which it began."""

    def __init__(self, queried: Sequence[int], report: Callable[[int, float], None]) -> None:
        """`queried` holds the sampling step of each query, in order. A step begins with the last query that belongs to it."""
        self.begins = {query: step for query, step in enumerate(queried) if step not in queried[query + 1 :]}
        self.report, self.queries, self.begun = report, 0, (0, 0.0)

    def query(self, sigma: Tensor) -> None:
        """Call this for every query of the sampler, with its noise level."""
        step = self.begins.get(self.queries)
        self.queries += 1
        if step is not None:
            if step:
                self.report(*self.begun)
            self.begun = (step, TIMESTEPS * sigma.flatten()[0].item())

    def finish(self) -> None:
        """Report the last step. Call this when the sampler has returned."""
        self.report(*self.begun)


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
    forwards_of = open_forwards(context or DistributedContext())
    with closing(forwards_of(model, condition_sets, len(plan.sigmas) - 1)) as forwards:
        while True:
            spans_now = iter(()) if live and in_flight else remaining  # live sound: finish what is in flight before waiting for more sound
            while (block_state := plan.next_block(blocks, spans_now)) and all(
                forwards.accepts(request) for request in block_state.requests
            ):
                for request in block_state.take_requests():
                    forwards.submit(request)
                    in_flight.append(block_state)
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
    sampler, source, unconditional, on_step = sampling
    sigmas = sigmas_of(sampler.schedule, sampler.sample_steps, sampler.sample_shift)
    sample = pick(SAMPLERS, sampler.name, "sampler.name")
    unguided_velocity = _clip_velocity(model, unconditional or conditions.drop("audio"), execution)
    guided = guidance(unguided_velocity, sampler.sample_guide_scale)(_clip_velocity(model, conditions, execution))
    noise = _noise(conditions.ref, latent_frames, source.generator)
    if on_step is None:
        return sample(guided, noise, sigmas, source.generator)
    reporter = StepReporter(sample.steps_queried(len(sigmas) - 1), partial(on_step, 0))

    def reported(x: Tensor, sigma: Tensor) -> Tensor:
        reporter.query(sigma)
        return guided(x, sigma)

    clean = sample(reported, noise, sigmas, source.generator)
    reporter.finish()
    return clean


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
        for previous, block in zip([None, *blocks], blocks, strict=False):
            if block.requests and self._previous_is_past(previous, block.queries):
                return block
        span = next(remaining, None) if self._previous_is_past(blocks[-1] if blocks else None, 0) else None
        if span is None:
            return None
        blocks.append(_BlockState(self, span))
        return blocks[-1]

    def _previous_is_past(self, previous: _BlockState | None, query: int) -> bool:
        """Whether the previous block has submitted its last query at the sampling step of this one."""
        return previous is None or self.steps[query] not in self.steps[previous.queries :]


class _BlockState:
    """A block that is being sampled: its sampler coroutine, the current query, and the forwards that the query needs."""

    def __init__(self, plan: _RolloutPlan, span: BlockSpan) -> None:
        self.plan, self.span, self.queries = plan, span, 0
        source, ref, count = plan.source, plan.conditions[0].ref, len(plan.steps) * len(plan.conditions)
        noise = source.noise(span) if source.noise else _noise(ref, span.latent_frames, source.generator)
        positions = source.ref_positions or (lambda span, count: [plan.model.ref_position(span.start)] * count)
        self.ref_positions = positions(span, count)
        self.inputs: list[BlockInputs] = [plan.model.prepare_block(each.at(span), span) for each in plan.conditions]
        self.sampling = plan.sampler.coroutine(noise, plan.sigmas, source.generator)
        self.query: Query = next(self.sampling)
        self.reporter = plan.on_step and StepReporter(plan.steps, partial(plan.on_step, span.index))
        if self.reporter:
            self.reporter.query(self.query.sigma)
        self.requests = self._requests()
        self.velocities: list[Tensor] = []

    def take_requests(self) -> list[ForwardRequest]:
        """The forwards of the current query, the unguided one first. A second call before `advance` gives none."""
        requests, self.requests = self.requests, []
        self.queries += 1
        return requests

    def advance(self, prediction: Tensor, scale: float) -> Tensor | None:
        """Add the prediction of one forward; when all forwards of the query are back, advance the sampler.

        Returns the clean latents after the last step, else None.
        """
        x, sigma, _ = self.query
        self.velocities.append(self.plan.to_velocity(prediction, x, sigma))
        if len(self.velocities) < len(self.inputs):
            return None
        (first, *_, last), self.velocities = (self.velocities[0], self.velocities[-1]), []
        velocity = guidance(lambda *_: first, scale)(lambda *_: last)
        try:
            self.query = self.sampling.send(velocity(x, sigma))
        except StopIteration as end:
            if self.reporter:
                self.reporter.finish()
            return end.value
        if self.reporter:
            self.reporter.query(self.query.sigma)
        self.requests = self._requests()
        return None

    def _requests(self) -> list[ForwardRequest]:
        x, sigma, step = self.query
        positions = self.ref_positions[self.queries * len(self.inputs) :]
        inputs = [each._replace(ref_position=positions[index]) for index, each in enumerate(self.inputs)]
        return [ForwardRequest(x, TIMESTEPS * sigma, each, index, step) for index, each in enumerate(inputs)]


def _clip_velocity(model: AvatarDiT, conditions: Conditions, execution: Execution) -> Velocity:
    to_velocity = velocity_from(model.config.prediction)
    return lambda x, sigma: to_velocity(model(x, TIMESTEPS * sigma, conditions, execution=execution), x, sigma)


def _noise(like: Tensor, latent_frames: int, generator: torch.Generator) -> Tensor:
    """Float32 noise on the device of `like`, drawn on the device of the generator, so that a seed gives the same noise on any device."""
    batch, channels, _, height, width = like.shape
    return torch.randn(batch, channels, latent_frames, height, width, generator=generator, device=generator.device).to(like.device)
