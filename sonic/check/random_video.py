"""Videos of random weights and random inputs: forwards, and blocks of latents, for the sections of the device check."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sonic.check.shapes import Case
from sonic.checkpoint.load import fill_randomly, without_memory
from sonic.config import Ranks, SamplerConfig
from sonic.geometry import PIXELS_PER_LATENT, BlockSpan, plan_blocks
from sonic.inference.batch import Opened, open_components
from sonic.inference.distributed_rollout import distributed_rollout
from sonic.inference.infer_config import InferConfig
from sonic.inference.rollout import NoiseSource, Sampling, seeded
from sonic.model.dit import AvatarDiT
from sonic.parallel.context import DistributedContext
from sonic.planner.workload import Workload
from sonic.types import Conditions, LatentBlock


def random_conditions(work: Workload, like: Tensor, *, blocks: int) -> Conditions:
    """Random conditions of so many blocks on the device and in the dtype of `like`; the same numbers everywhere."""
    rng, model, size = seeded(0), work.model, (work.height // PIXELS_PER_LATENT, work.width // PIXELS_PER_LATENT)
    draw = lambda *shape: torch.randn(1, *shape, generator=rng).to(like)  # noqa: E731
    channels, audio = model.trunk.latent_channels, model.audio
    return Conditions(
        ref=draw(channels, 1, *size),
        text=draw(model.text.text_len, model.text.text_dim),
        audio=draw(audio.num_audio_layers, audio.audio_dim, blocks * work.frames),
        motion=draw(channels, sum(model.motion.buckets), *size),
    )


def random_model(work: Workload, device: torch.device, dtype: torch.dtype) -> AvatarDiT:
    """A transformer with random weights."""
    model = without_memory(work.model).to(dtype).eval().requires_grad_(False).to_empty(device=device)
    fill_randomly(model)
    return model


@torch.no_grad()
def forward_of(model: AvatarDiT, work: Workload, *, blocks: int = 1) -> Callable[[], Tensor]:
    """The forward of the last of so many blocks, which may be called any number of times; those before it have run.  -> [1,C,T,h,w]"""
    like, count = model.patch_embed.weight, work.latent_frames
    conditions = random_conditions(work, like, blocks=blocks)
    cache = model.prefill(conditions, model.new_cache(conditions, steps=1))
    latents = torch.randn(1, conditions.ref.shape[1], count, *conditions.ref.shape[3:], generator=seeded(1)).to(like.device)
    timestep = torch.full((1,), 500.0, device=like.device)

    @torch.no_grad()
    def forward(block: int) -> Tensor:
        span = BlockSpan(block, block * count, count)
        inputs = model.prepare_block(conditions.at(span), span)
        return model.denoise_block(latents, timestep, inputs, cache=cache, ring=cache.rings[0])

    for block in range(blocks - 1):
        forward(block)
    return lambda: forward(blocks - 1)


def blocks_of(model: AvatarDiT, context: DistributedContext, work: Workload, *, count: int, sampler: SamplerConfig) -> Iterator[LatentBlock]:
    """Yield so many blocks of a video, as the library makes them; on every call the same."""
    like = torch.empty(0, device=context.world.device, dtype=next(model.parameters()).dtype)
    conditions = random_conditions(work, like, blocks=count)
    spans = plan_blocks(count * work.frames, work.model.rollout.block_frames)
    return distributed_rollout(model, conditions, spans, sampling=Sampling(sampler, NoiseSource(seeded(0))), context=context)


@contextmanager
def opened(case: Case, config: InferConfig, ranks: Ranks = Ranks(), *, decodes: bool = False) -> Iterator[Opened]:
    """The loaded networks of a video; their memory is free again after the `with` block."""
    with open_components(config, ranks, family=case.family(decodes=decodes)) as found:
        found.components.load()
        yield found
        found.components.model = found.components.autoencoder = None
    release(case)


def release(case: Case) -> None:
    """Free what is no longer used of the GPU, and begin to measure its peak anew."""
    gc.collect()
    if case.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(case.device)
