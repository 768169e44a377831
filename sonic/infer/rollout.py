"""From noise to clean latents: block by block for as long as somebody asks, or a whole clip at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from typing import NamedTuple

import torch
from torch import Tensor

from sonic.config import SamplerConfig
from sonic.flow.guidance import guidance
from sonic.flow.path import velocity_from
from sonic.flow.samplers import SAMPLERS, WALKS, Velocity, Walk
from sonic.flow.schedule import TIMESTEPS, sigmas_of
from sonic.model.dit import AvatarDiT, BlockInputs
from sonic.model.forwards import Item
from sonic.types import BlockSpan, Conditions, LatentBlock, pick


class Draws(NamedTuple):
    """What is free in a rollout and how it is settled: by a generator; or, for the noise of a block and for the time id of the
    reference in each forward (default: the configured rule), by somebody else."""

    generator: torch.Generator
    noise: Callable[[BlockSpan], Tensor] | None = None
    ref_position: Callable[[BlockSpan], int] | None = None


@torch.no_grad()
def rollout(
    model: AvatarDiT,
    conditions: Conditions,
    spans: Iterable[BlockSpan],
    *,
    sampler: SamplerConfig,
    draws: Draws,
    unguided: Conditions | None = None,
) -> Iterator[LatentBlock]:
    """Blocks of clean latents, each as soon as it is done; what is kept does not grow with their number.

    `unguided` is what guidance leads away from (default: the same without audio). As many forwards are under way as
    `model.forwards` has room for: of the oldest blocks first, and of a new block once the one before it has left its ring.
    """
    scale = sampler.sample_guide_scale
    told = (conditions,) if scale == 1 else (unguided or conditions.drop("audio"), conditions)
    route = _Route(model, told, sampler, draws=draws)
    under_way: deque[_Block] = deque()  # one entry per item, in the order in which they were submitted
    blocks: list[_Block] = []  # begun and not finished, oldest first
    unseen = iter(spans)
    with closing(model.forwards(model, told, len(route.sigmas) - 1)) as forwards:
        while True:
            while (ready := route.ready(blocks, unseen)) and all(forwards.accepts(item) for item in ready.asked):
                for item in ready.ask():
                    forwards.submit(item)
                    under_way.append(ready)
            if not under_way:
                return
            for said in forwards.collect():
                block = under_way.popleft()
                if (clean := block.told(said, scale)) is not None:
                    blocks.remove(block)
                    yield LatentBlock(clean, block.span)


@torch.no_grad()
def sample_clip(
    model: AvatarDiT,
    conditions: Conditions,
    latent_frames: int,
    *,
    sampler: SamplerConfig,
    generator: torch.Generator,
    unguided: Conditions | None = None,
) -> Tensor:
    """One clip of clean latents [B,C,latent_frames,H,W] with full attention, as Wan2.2-S2V makes it."""
    sigmas = sigmas_of(sampler.schedule, sampler.sample_steps, sampler.sample_shift)
    sample = pick(SAMPLERS, sampler.name, "sampler.name")
    wrap = guidance(_clip_velocity(model, unguided or conditions.drop("audio")), sampler.sample_guide_scale)
    noise = _noise(conditions.ref, latent_frames, generator)
    return sample(wrap(_clip_velocity(model, conditions)), noise, sigmas, generator)


class _Route:
    """What all blocks of a film have in common: the noise levels, and the rings that a walk visits one after the other.

    Each noise level has its ring, so a block meets the others as they were at that level.
    """

    def __init__(self, model: AvatarDiT, told: Sequence[Conditions], sampler: SamplerConfig, *, draws: Draws) -> None:
        self.model, self.told, self.draws = model, told, draws
        self.sigmas = sigmas_of(sampler.schedule, sampler.sample_steps, sampler.sample_shift)
        self.walk = pick(WALKS, sampler.name, "sampler.name")
        self.to_velocity = velocity_from(model.config.prediction)
        self.visits: list[int] = []
        SAMPLERS[sampler.name](self._trace, torch.zeros(1, 1), self.sigmas, torch.Generator())

    def ready(self, blocks: list[_Block], unseen: Iterator[BlockSpan]) -> _Block | None:
        """The oldest block with a question that may be asked now; a new one when the others allow it."""
        for before, block in zip([None, *blocks], blocks, strict=False):
            if block.asked and self._passed(before, block.evaluations):
                return block
        span = next(unseen, None) if self._passed(blocks[-1] if blocks else None, 0) else None
        if span is None:
            return None
        blocks.append(_Block(self, span))
        return blocks[-1]

    def ring(self, sigma: Tensor) -> int:
        """The ring of a noise level."""
        return int((self.sigmas[:-1] - sigma[0].item()).abs().argmin())

    def _passed(self, before: _Block | None, evaluation: int) -> bool:
        """Whether the block before has asked all it will ask of the ring of this evaluation."""
        ring = self.visits[evaluation]
        return before is None or ring not in self.visits[before.evaluations :]

    def _trace(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.visits.append(self.ring(sigma))
        return torch.zeros_like(x)


class _Block:
    """A block between noise and clean latents: its walk, and the forwards that the walk waits for."""

    def __init__(self, route: _Route, span: BlockSpan) -> None:
        self.route, self.span, self.evaluations = route, span, 0
        draws, ref = route.draws, route.told[0].ref
        noise = draws.noise(span) if draws.noise else _noise(ref, span.latent_frames, draws.generator)
        place = draws.ref_position or (lambda span: route.model.ref_position(span.start))
        self.places = [place(span) for _ in route.visits for _ in route.told]
        self.inputs: list[BlockInputs] = [route.model.prepare_block(each.at(span), span) for each in route.told]
        self.walk: Walk = route.walk(noise, route.sigmas, draws.generator)
        self.x, self.sigma = next(self.walk)
        self.asked = self._items()
        self.answers: list[Tensor] = []

    def ask(self) -> list[Item]:
        """The forwards of this evaluation, of what is unguided first."""
        asked, self.asked = self.asked, []
        self.evaluations += 1
        return asked

    def told(self, said: Tensor, scale: float) -> Tensor | None:
        """Walk on when all is said; the clean latents at the end of the walk, None before it."""
        self.answers.append(self.route.to_velocity(said, self.x, self.sigma))
        if len(self.answers) < len(self.inputs):
            return None
        (first, *_, last), self.answers = (self.answers[0], self.answers[-1]), []
        velocity = guidance(lambda *_: first, scale)(lambda *_: last)
        try:
            self.x, self.sigma = self.walk.send(velocity(self.x, self.sigma))
        except StopIteration as end:
            return end.value
        self.asked = self._items()
        return None

    def _items(self) -> list[Item]:
        ring, timestep, count = self.route.ring(self.sigma), TIMESTEPS * self.sigma, len(self.inputs)
        places = self.places[self.evaluations * count :]
        return [Item(self.x, timestep, each, told, ring, places[told]) for told, each in enumerate(self.inputs)]


def _clip_velocity(model: AvatarDiT, conditions: Conditions) -> Velocity:
    to_velocity = velocity_from(model.config.prediction)
    return lambda x, sigma: to_velocity(model(x, TIMESTEPS * sigma, conditions), x, sigma)


def _noise(like: Tensor, latent_frames: int, generator: torch.Generator) -> Tensor:
    """Float32 noise drawn on the generator's device, so that a seed means the same everywhere."""
    batch, channels, _, height, width = like.shape
    return torch.randn(batch, channels, latent_frames, height, width, generator=generator, device=generator.device).to(like.device)
