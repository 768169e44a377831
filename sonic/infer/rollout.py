"""From noise to clean latents: block by block for as long as somebody asks, or a whole clip at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sonic.config import SamplerConfig
from sonic.flow.guidance import guidance
from sonic.flow.path import velocity_from
from sonic.flow.samplers import SAMPLERS, Velocity
from sonic.flow.schedule import sigmas_of
from sonic.model.dit import AvatarDiT, BlockInputs
from sonic.model.kv_cache import KVCache
from sonic.types import BlockSpan, Conditions, LatentBlock, pick

TIMESTEPS = 1000.0  # a timestep is 1000·sigma


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

    `unguided` is what guidance leads away from (default: the same without audio).
    """
    sigmas = sigmas_of(sampler.schedule, sampler.sample_steps, sampler.sample_shift)
    sample = pick(SAMPLERS, sampler.name, "sampler.name")
    told = (conditions,) if sampler.sample_guide_scale == 1 else (conditions, unguided or conditions.drop("audio"))
    caches = [model.prefill(each, model.new_cache(each, steps=len(sigmas) - 1)) for each in told]
    for span in spans:
        noise = draws.noise(span) if draws.noise else _noise(conditions.ref, span.latent_frames, draws.generator)
        inputs = [model.prepare_block(each.at(span), span) for each in told]
        velocities = [
            _block_velocity(model, each, cache=cache, sigmas=sigmas, ref_position=draws.ref_position)
            for each, cache in zip(inputs, caches, strict=True)
        ]
        velocity = guidance(velocities[-1], sampler.sample_guide_scale)(velocities[0])
        yield LatentBlock(sample(velocity, noise, sigmas, draws.generator), span)


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


def _block_velocity(
    model: AvatarDiT, inputs: BlockInputs, *, cache: KVCache, sigmas: Tensor, ref_position: Callable[[BlockSpan], int] | None
) -> Velocity:
    """The velocity of one block. Each noise level has its ring, so a block meets the others as they were at that level."""
    to_velocity = velocity_from(model.config.prediction)

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        ring = cache.rings[int((sigmas[:-1] - sigma[0].item()).abs().argmin())]
        position = ref_position(inputs.span) if ref_position else None
        said = model.denoise_block(x, TIMESTEPS * sigma, inputs, cache=cache, ring=ring, ref_position=position)
        return to_velocity(said, x, sigma)

    return velocity


def _clip_velocity(model: AvatarDiT, conditions: Conditions) -> Velocity:
    to_velocity = velocity_from(model.config.prediction)
    return lambda x, sigma: to_velocity(model(x, TIMESTEPS * sigma, conditions), x, sigma)


def _noise(like: Tensor, latent_frames: int, generator: torch.Generator) -> Tensor:
    """Float32 noise drawn on the generator's device, so that a seed means the same everywhere."""
    batch, channels, _, height, width = like.shape
    return torch.randn(batch, channels, latent_frames, height, width, generator=generator, device=generator.device).to(like.device)
