"""Generates videos whose every pixel comes from the Wan VAE: clip by clip like Wan2.2-S2V, or block by block like Live Avatar."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from sonic.config import SamplerConfig
from sonic.data.pixels import to_signed
from sonic.geometry import FRAMES_PER_LATENT, BlockSpan, plan_blocks
from sonic.inference.distributed_rollout import distributed_clip, distributed_rollout
from sonic.inference.live_features import LiveFeatures
from sonic.inference.rollout import NoiseSource, OnStep, Sampling, seeded
from sonic.inference.stream import decoding_stream, with_events
from sonic.model.dit import AvatarDiT
from sonic.model.embed import ref_time_id
from sonic.parallel.context import DistributedContext
from sonic.parallel.vae_rank import RemoteAutoencoder
from sonic.system.device_stream import DeviceStream, Event, current_stream
from sonic.types import Conditions, LatentBlock, upload
from sonic.vae.wan_vae import WanAutoencoder

Vae = WanAutoencoder | RemoteAutoencoder  # on this rank, or a proxy for the one on another rank
Stage = Callable[[str, DeviceStream], AbstractContextManager]  # stage(name, stream) adds the time inside to that stage
unmeasured: Stage = lambda name, stream: nullcontext()  # noqa: E731
BlocksWithEvents = Iterator[tuple[LatentBlock, Event]]

DROPPED_FRAMES = 3  # the published pipelines drop these from the first clip, so the video runs ahead of its sound
PAST_FRAMES = 73  # video frames of the past that become motion latents: 1 + 4·18
POSE_CHUNK = 48  # pose frames that are encoded at once
WARM_LATENTS = 7  # latent frames of the still picture that fill the cache of the decoder before the first block
STILL_REPEATS = 5  # the published pipeline repeats its picture five times where one frame is meant


class WanNetworks(NamedTuple):
    """The transformer, the VAE (here or on another rank), and the context they run in."""

    model: AvatarDiT
    vae: Vae
    context: DistributedContext = DistributedContext()


@dataclass(frozen=True)
class EncodedInputs:
    """The encoded inputs of a Wan video.

    picture [1,3,H,W] in [-1,1]; text and negative [1,L,D], the embeddings of the prompt and of the negative prompt; audio
    [voices,K,E,F] speech features, one column per video frame; clip_frames, the video frames of one clip; pose uint8 [F,H,W,3] or None;
    masks [voices,1,h,w], weights of the audio on the grid of patches, or None for 1 everywhere; generator, used in place of one seeded
    with `seed`; live, the source of speech features in place of `audio` while the sound is still arriving.
    """

    picture: Tensor
    text: Tensor
    negative: Tensor
    audio: Tensor
    clip_frames: int
    seed: int = 0
    pose: np.ndarray | None = None
    masks: Tensor | None = None
    generator: torch.Generator | None = None
    live: LiveFeatures | None = None

    @property
    def num_frames(self) -> int:
        """Number of video frames, which is a multiple of a block or clip; 0 while the sound is still arriving."""
        return self.audio.shape[-1]

    @property
    def clips(self) -> int:
        """Number of clips that cover the video."""
        return -(-self.num_frames // self.clip_frames)


@torch.no_grad()
def generate_clips(
    networks: WanNetworks,
    encoded: EncodedInputs,
    *,
    sampler: SamplerConfig,
    upstream: bool = False,
    stage: Stage = unmeasured,
    on_step: OnStep | None = None,
) -> Iterator[Tensor]:
    """Yield the frames [1,3,F,H,W] in [-1,1] of each clip, sampled with full attention.

    The 73 video frames before a clip are its motion condition (grey frames before the start); the first clip has none. `upstream`
    seeds every clip with seed + index and drops the first three frames of the video, as the published pipeline does.
    `stage` measures the time of each stage.
    """
    model, vae, context = networks
    ref, _ = vae.encode(encoded.picture.unsqueeze(2))
    past = torch.zeros(1, 3, PAST_FRAMES, *encoded.picture.shape[-2:], device=ref.device)
    stream = current_stream(ref.device)
    motion, rng = None, encoded.generator or seeded(encoded.seed)
    for index in range(encoded.clips):
        if upstream:
            rng.manual_seed(encoded.seed + index)
        with stage("denoise", stream):
            span = slice(index * encoded.clip_frames, (index + 1) * encoded.clip_frames)
            conditions = _conditions(encoded, ref, motion, frames=span, vae=vae, dtype=_dtype(model))
            latent_frames = encoded.clip_frames // FRAMES_PER_LATENT
            reported = on_step and (lambda _, step, timestep, clip=index: on_step(clip, step, timestep))
            sampling = Sampling(sampler, NoiseSource(rng), _unconditional(encoded, conditions), reported)
            latents = distributed_clip(model, conditions, latent_frames, sampling=sampling, context=context).to(ref.dtype)
        with stage("decode", stream):
            seen, _ = vae.decode(torch.cat((ref if motion is None else motion, latents), dim=2))
        frames = seen[:, :, -encoded.clip_frames :]
        if upstream and index == 0:
            frames = frames[:, :, DROPPED_FRAMES:]
        yield frames
        past = torch.cat((past, frames), dim=2)[:, :, -PAST_FRAMES:]
        if index + 1 < encoded.clips:
            with stage("decode", stream):
                motion, _ = vae.encode(past)


@torch.no_grad()
def generate_blocks(
    networks: WanNetworks,
    encoded: EncodedInputs,
    *,
    sampler: SamplerConfig,
    hand_over: Callable[[BlocksWithEvents], BlocksWithEvents] = iter,
    stage: Stage = unmeasured,
    on_step: OnStep | None = None,
) -> Iterator[Tensor]:
    """Yield the frames [1,3,F,H,W] in [-1,1] of each block, where F = 4·block_frames (12 as published).

    The transformer uses KV rings and the decoder a cache of fixed size, so memory does not grow with the length. `hand_over` wraps the
    iterator of latent blocks before decoding, for example to sample them in another thread. Frames are made on the `decoding_stream`.
    """
    model, vae, context = networks
    still = encoded.picture.unsqueeze(2)
    ref, _ = vae.encode(still)
    motion, _ = vae.encode(still.expand(-1, -1, PAST_FRAMES, -1, -1))
    conditions = _conditions(encoded, ref, motion, frames=slice(None), vae=vae, dtype=_dtype(model))
    block_frames = model.config.rollout.block_frames
    spans = plan_blocks(encoded.num_frames, block_frames) if encoded.live is None else encoded.live.spans(block_frames)
    stream, decode = decoding_stream(ref.device), lambda latents, *known: vae.decode(latents.to(ref.dtype), *known)
    stream.wait(current_stream(ref.device).record())
    _, cache = stream.run(decode, motion[:, :, :WARM_LATENTS])
    sampling = Sampling(sampler, NoiseSource(encoded.generator or seeded(encoded.seed)), _unconditional(encoded, conditions), on_step)
    blocks = hand_over(with_events(distributed_rollout(model, conditions, spans, sampling=sampling, context=context)))
    for block, made in blocks:
        stream.wait(made)
        with stage("decode", stream):
            frames, cache = stream.run(decode, block.latents, cache)
        yield frames


@torch.no_grad()
def generate_blocks_upstream(
    networks: WanNetworks,
    encoded: EncodedInputs,
    *,
    sampler: SamplerConfig,
    ref_distances: Iterator[int] | None = None,
    stage: Stage = unmeasured,
    on_step: OnStep | None = None,
) -> Iterator[Tensor]:
    """Yield the frames of each clip, sampled block by block as in the published single-GPU pipeline of Live Avatar.

    Differences from `generate_blocks`: the picture is repeated five times before it is encoded; each clip has its own seed; the last
    frames of a clip are encoded again as motion for decoding the next; the first three frames of the video are dropped; the
    reference moves to a random distance, drawn from the seed (there unseeded) or taken from `ref_distances`, one per forward.
    """
    model, vae, context = networks
    still = encoded.picture.unsqueeze(2)
    ref = vae.encode(still.expand(-1, -1, STILL_REPEATS, -1, -1))[0][:, :, 1:]
    stream = current_stream(ref.device)
    past = still.expand(-1, -1, STILL_REPEATS * PAST_FRAMES, -1, -1)
    motion, _ = vae.encode(past)
    conditions = _conditions(encoded, ref, motion, frames=slice(None), vae=vae, dtype=_dtype(model))
    distance_rng = random.Random(encoded.seed)
    distances = (distance_rng.randint(4, 30) for _ in count()) if ref_distances is None else ref_distances

    def ref_positions(span: BlockSpan, forwards: int) -> list[int]:
        position = model.config.rollout.ref_position
        return [ref_time_id(span.start, ref_position=position, distance=next(distances)) for _ in range(forwards)]

    spans = plan_blocks(encoded.num_frames, model.config.rollout.block_frames)
    source = NoiseSource(torch.Generator(), _clip_noise(conditions.ref, encoded), ref_positions)
    sampling = Sampling(sampler, source, _unconditional(encoded, conditions), on_step)
    blocks = distributed_rollout(model, conditions, spans, sampling=sampling, context=context)
    per_clip = encoded.clip_frames // (FRAMES_PER_LATENT * model.config.rollout.block_frames)
    for index in range(encoded.clips):
        with stage("denoise", stream):
            latents = torch.cat([block.latents for block in islice(blocks, per_clip)], dim=2).to(ref.dtype)
        with stage("decode", stream):
            seen, _ = vae.decode(torch.cat((motion, latents), dim=2))
        frames = seen[:, :, -FRAMES_PER_LATENT * latents.shape[2] :]
        frames = frames[:, :, DROPPED_FRAMES:] if index == 0 else frames
        yield frames
        past = torch.cat((past, frames[:, :, -PAST_FRAMES:]), dim=2)[:, :, -past.shape[2] :]
        if index + 1 < encoded.clips:
            with stage("decode", stream):
                motion, _ = vae.encode(past)


def _conditions(encoded: EncodedInputs, ref: Tensor, motion: Tensor | None, *, frames: slice, vae: Vae, dtype: torch.dtype) -> Conditions:
    """The conditions of the model for the video frames in `frames`, in `dtype`.

    Speech features may take gigabytes, so they keep their device and dtype until the model encodes them.
    """
    pose = None if encoded.pose is None else _pose_latents(encoded.pose[frames], vae, device=ref.device)
    conditions = Conditions(ref=ref, text=encoded.text.to(ref), motion=motion, pose=pose).to(dtype=dtype)
    if encoded.live is not None:
        return encoded.live.conditions(replace(conditions, masks=encoded.masks))
    return replace(conditions, audio=encoded.audio[..., frames], masks=encoded.masks)


def _pose_latents(pose: np.ndarray, vae: Vae, *, device: torch.device) -> Tensor:
    """Encode poses in pieces of 48 frames.  uint8 [F,H,W,3] -> latents [1,C,F/4,h,w]

    The first frame is encoded once more in front; it becomes a latent frame of its own, which is dropped.
    """

    def frames(some: np.ndarray) -> Tensor:
        return to_signed(rearrange(upload(torch.from_numpy(some), device), "f h w c -> 1 c f h w"))

    _, cache = vae.encode(frames(pose[:1]))
    found = []
    for first in range(0, len(pose), POSE_CHUNK):
        latents, cache = vae.encode(frames(pose[first : first + POSE_CHUNK]), cache)
        found.append(latents)
    return torch.cat(found, dim=2)


def _unconditional(encoded: EncodedInputs, conditions: Conditions) -> Conditions:
    """The conditions of the unguided forward: the negative prompt and no audio, with the same reference, motion and pose."""
    return replace(conditions.drop("audio"), text=encoded.negative.to(conditions.text))


def _clip_noise(like: Tensor, encoded: EncodedInputs) -> Callable[[BlockSpan], Tensor]:
    """A function that gives the noise of a block as in the published pipeline.

    The noise of a whole clip is drawn with the seed plus the index of the clip; a block gets its latent frames of it.
    """
    latent_frames = encoded.clip_frames // FRAMES_PER_LATENT

    def noise(span: BlockSpan) -> Tensor:
        clip, first = divmod(span.start, latent_frames)
        rng = seeded(encoded.seed + clip)
        drawn = torch.randn(like.shape[1], latent_frames, *like.shape[3:], generator=rng)
        return upload(drawn[None, :, first : first + span.latent_frames], like.device)

    return noise


def _dtype(model: AvatarDiT) -> torch.dtype:
    return next(model.parameters()).dtype
