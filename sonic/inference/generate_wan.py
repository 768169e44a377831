"""Films whose every pixel is painted by the Wan VAE: clip by clip as Wan2.2-S2V makes them, or block by block as Live Avatar does."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from sonic.config import SamplerConfig
from sonic.data.pixels import to_bytes, to_signed
from sonic.geometry import FRAMES_PER_LATENT, PIXELS_PER_LATENT, plan_blocks
from sonic.inference.components import ReadyParts
from sonic.inference.conditions import signed
from sonic.inference.distributed_rollout import distributed_clip, distributed_rollout
from sonic.inference.inputs import LOST_FRAMES, Settings
from sonic.inference.report import Clock
from sonic.inference.rollout import NoiseSource, Sampling
from sonic.inference.stream import HANDOVERS
from sonic.model.dit import AvatarDiT
from sonic.model.embed import ref_time_id
from sonic.parallel.context import DistributedContext
from sonic.parallel.vae_rank import RemoteAutoencoder
from sonic.types import BlockSpan, Conditions, FrameChunk, LatentBlock, Scene
from sonic.vae.wan_vae import WanAutoencoder

Vae = WanAutoencoder | RemoteAutoencoder  # here, or asked where it is
Stage = Callable[[str], AbstractContextManager]  # counts the time inside as that of a stage

PAST_FRAMES = 73  # video frames of the past that become motion latents: 1 + 4·18
POSE_CHUNK = 48  # frames of poses that are encoded at once
WARM_LATENTS = 7  # of the still picture, decoded before the first block so that the decoder's memory is full
STILL_REPEATS = 5  # the published rollout shows its picture five times over wherever one frame is meant


class WanNetworks(NamedTuple):
    """The transformer, the VAE (here or on another rank), and the context they run in."""

    model: AvatarDiT
    vae: Vae
    context: DistributedContext = DistributedContext()


@dataclass(frozen=True)
class Shot:
    """What a painted film is made from.

    picture [1,3,H,W] in [-1,1]; text and negative [1,L,D] rows of the prompt and of what to stay away from;
    audio [voices,N,A,F] speech features, one column per video frame, as many as there are frames; clip_frames in one clip; seed;
    pose uint8 [F,H,W,3] or None; masks [voices,1,h,w] of several voices, over the patches, or None.
    """

    picture: Tensor
    text: Tensor
    negative: Tensor
    audio: Tensor
    clip_frames: int
    seed: int = 0
    pose: np.ndarray | None = None
    masks: Tensor | None = None

    @property
    def num_frames(self) -> int:
        """Video frames of the film."""
        return self.audio.shape[-1]

    @property
    def clips(self) -> int:
        """Clips that cover the film."""
        return -(-self.num_frames // self.clip_frames)


@torch.no_grad()
def paint_clips(
    networks: WanNetworks,
    shot: Shot,
    *,
    sampler: SamplerConfig,
    upstream: bool = False,
    stage: Stage = nullcontext,
) -> Iterator[Tensor]:
    """Frames [1,3,F,H,W] in [-1,1], clip by clip with full attention; the last frames of each clip are the motion of the next.

    `upstream` seeds every clip anew and cuts the first frames off, as the published pipeline does. `stage` times.
    """
    model, vae, context = networks
    ref, _ = vae.encode(shot.picture.unsqueeze(2))
    past = torch.zeros(1, 3, PAST_FRAMES, *shot.picture.shape[-2:], device=ref.device)
    motion, rng = None, torch.Generator().manual_seed(shot.seed)
    for index in range(shot.clips):
        if upstream:
            rng.manual_seed(shot.seed + index)
        with stage("denoise"):
            span = slice(index * shot.clip_frames, (index + 1) * shot.clip_frames)
            told = _told(shot, ref, motion, frames=span, vae=vae, dtype=_dtype(model))
            latent_frames = shot.clip_frames // FRAMES_PER_LATENT
            sampling = Sampling(sampler, NoiseSource(rng), _against(shot, told))
            latents = distributed_clip(model, told, latent_frames, sampling=sampling, context=context).to(ref.dtype)
        with stage("decode"):
            seen, _ = vae.decode(torch.cat((ref if motion is None else motion, latents), dim=2))
        frames = seen[:, :, -shot.clip_frames :]
        if upstream and index == 0:
            frames = frames[:, :, LOST_FRAMES:]
        yield frames
        past = torch.cat((past, frames), dim=2)[:, :, -PAST_FRAMES:]
        if index + 1 < shot.clips:
            with stage("decode"):
                motion, _ = vae.encode(past)


@torch.no_grad()
def paint_blocks(
    networks: WanNetworks,
    shot: Shot,
    *,
    sampler: SamplerConfig,
    hand_over: Callable[[Iterator[LatentBlock]], Iterator[LatentBlock]] = iter,
    stage: Stage = nullcontext,
) -> Iterator[Tensor]:
    """Frames [1,3,12,H,W] in [-1,1], block by block over the KV rings; the decoder is a stream too, so nothing grows with time.

    Latents pass through `hand_over` on their way to the decoder, which may be on another thread.
    """
    model, vae, context = networks
    still = shot.picture.unsqueeze(2)
    ref, _ = vae.encode(still)
    motion, _ = vae.encode(still.expand(-1, -1, PAST_FRAMES, -1, -1))
    told = _told(shot, ref, motion, frames=slice(None), vae=vae, dtype=_dtype(model))
    spans = plan_blocks(shot.num_frames, model.config.rollout.block_frames)
    rng = torch.Generator().manual_seed(shot.seed)
    _, cache = vae.decode(motion[:, :, :WARM_LATENTS])
    sampling = Sampling(sampler, NoiseSource(rng), _against(shot, told))
    blocks = hand_over(distributed_rollout(model, told, spans, sampling=sampling, context=context))
    for block in blocks:
        with stage("decode"):
            frames, cache = vae.decode(block.latents.to(ref.dtype), cache)
        yield frames


@torch.no_grad()
def paint_blocks_upstream(
    networks: WanNetworks,
    shot: Shot,
    *,
    sampler: SamplerConfig,
    ref_distances: Iterator[int] | None = None,
    stage: Stage = nullcontext,
) -> Iterator[Tensor]:
    """The same with the habits of the published single-GPU pipeline, clip by clip: its picture repeated five times, seeds per clip,
    a reference that wanders (`ref_distances`, one per forward; there unseeded, here from the seed), frames encoded again, and
    the first three of them lost."""
    model, vae, context = networks
    still = shot.picture.unsqueeze(2)
    ref = vae.encode(still.expand(-1, -1, STILL_REPEATS, -1, -1))[0][:, :, 1:]
    past = still.expand(-1, -1, STILL_REPEATS * PAST_FRAMES, -1, -1)
    motion, _ = vae.encode(past)
    told = _told(shot, ref, motion, frames=slice(None), vae=vae, dtype=_dtype(model))
    draws = random.Random(shot.seed)
    distances = iter(lambda: draws.randint(4, 30), None) if ref_distances is None else ref_distances

    def ref_positions(span: BlockSpan, forwards: int) -> list[int]:
        position = model.config.rollout.ref_position
        return [ref_time_id(span.start, ref_position=position, distance=next(distances)) for _ in range(forwards)]

    spans = plan_blocks(shot.num_frames, model.config.rollout.block_frames)
    source = NoiseSource(torch.Generator(), _clip_noise(told.ref, shot), ref_positions)
    sampling = Sampling(sampler, source, _against(shot, told))
    blocks = distributed_rollout(model, told, spans, sampling=sampling, context=context)
    per_clip = shot.clip_frames // (FRAMES_PER_LATENT * model.config.rollout.block_frames)
    for index in range(shot.clips):
        with stage("denoise"):
            latents = torch.cat([block.latents for block in islice(blocks, per_clip)], dim=2).to(ref.dtype)
        with stage("decode"):
            seen, _ = vae.decode(torch.cat((motion, latents), dim=2))
        frames = seen[:, :, -FRAMES_PER_LATENT * latents.shape[2] :]
        frames = frames[:, :, LOST_FRAMES:] if index == 0 else frames
        yield frames
        past = torch.cat((past, frames[:, :, -PAST_FRAMES:]), dim=2)[:, :, -past.shape[2] :]
        if index + 1 < shot.clips:
            with stage("decode"):
                motion, _ = vae.encode(past)


def film_painted(scene: Scene, parts: ReadyParts, settings: Settings, *, clock: Clock) -> Iterator[FrameChunk]:
    """The frames of a scene. Prompt and speech are encoded and their encoders gone before the transformer is loaded."""
    with clock.stage("encode"):
        shot = _shot(scene, parts, settings)
    with clock.stage("load"):
        networks = WanNetworks(parts.model, parts.autoencoder, parts.context)
    made = {"sampler": settings.sampler, "stage": clock.stage}
    if parts.config.rollout.clip_frames:
        frames = paint_clips(networks, shot, upstream=bool(settings.compat), **made)
    elif settings.compat:
        frames = paint_blocks_upstream(networks, shot, **made)
    else:
        hand_over = lambda blocks: HANDOVERS[settings.decode.online](  # noqa: E731
            clock.each("denoise", blocks), settings.decode.queue, name="denoise"
        )
        frames = paint_blocks(networks, shot, hand_over=hand_over, **made)
    start = 0
    with closing(frames):
        for some in frames:
            pixels = rearrange(to_bytes(some[0]), "c f h w -> f h w c")
            yield FrameChunk(pixels[: scene.num_frames - start].cpu(), start)
            start += min(len(pixels), scene.num_frames - start)
            if start == scene.num_frames:
                return


def _shot(scene: Scene, parts: ReadyParts, settings: Settings) -> Shot:
    """What the models are told, on their device; speech features reach to the end of the last block or clip."""
    config, checkpoint, device = parts.config, parts.checkpoint, parts.device
    length = config.text.text_len
    whole = config.rollout.clip_frames or settings.compat
    step = settings.clip_frames if whole else FRAMES_PER_LATENT * config.rollout.block_frames
    frames = -(-scene.num_frames // step) * step
    voices = [voice.samples for voice in scene.voices or (scene.speech,)]
    heard = checkpoint.hear_each(voices, frames, fps=scene.fps, device=device)
    read = checkpoint.reader(length, device)
    text = read(scene.prompt)
    patch = PIXELS_PER_LATENT * config.trunk.patch_size[1]
    return Shot(
        picture=signed(scene.portrait.pixels).to(device),
        text=text,
        negative=read(scene.negative_prompt) if settings.sampler.sample_guide_scale != 1 else text,
        audio=heard,
        clip_frames=settings.clip_frames,
        seed=scene.seed,
        pose=None if scene.pose is None else _lengthened(scene.pose, frames),
        masks=None if scene.masks is None else _over_patches(scene.masks, patch).to(device),
    )


def read_ahead(parts: ReadyParts, prompts: Iterable[str]) -> None:
    """Have the rows of all prompts at hand, so that no text encoder is loaded once the transformer is there.

    A prompt that cannot be read is left to its own film, which says so.
    """
    read = parts.checkpoint.reader(parts.config.text.text_len, parts.device)
    for prompt in dict.fromkeys(prompts):
        with suppress(ValueError, OSError):
            read(prompt)


def _lengthened(pose: np.ndarray, frames: int) -> np.ndarray:
    """The poses up to the end of the last block or clip, black where there are none."""
    return np.concatenate([pose, np.zeros((max(0, frames - len(pose)), *pose.shape[1:]), np.uint8)])


def _over_patches(masks: np.ndarray, patch: int) -> Tensor:
    """Masks [voices,H,W] as shares of patches, more than half of which count whole.  -> [voices,1,H/patch,W/patch] of 0 and 1"""
    share = F.avg_pool2d(torch.from_numpy(masks).float()[:, None], patch)
    return (share > 0.5).float()


def _told(shot: Shot, ref: Tensor, motion: Tensor | None, *, frames: slice, vae: Vae, dtype: torch.dtype) -> Conditions:
    """What the model is told of some frames of the film; poses are encoded with a frame in front that is thrown away again.

    Speech features, which may be gigabytes, stay where and as they are until the model hears them.
    """
    pose = None if shot.pose is None else _pose_latents(shot.pose[frames], vae, device=ref.device)
    told = Conditions(ref=ref, text=shot.text.to(ref), motion=motion, pose=pose).to(dtype=dtype)
    return replace(told, audio=shot.audio[..., frames], masks=shot.masks)


def _pose_latents(pose: np.ndarray, vae: Vae, *, device: torch.device) -> Tensor:
    """Poses uint8 [F,H,W,3] as latents [1,C,F/4,h,w], a few seconds at a time; the frame in front is the first one again."""
    still = lambda some: to_signed(rearrange(torch.from_numpy(some).to(device), "f h w c -> 1 c f h w"))  # noqa: E731
    _, cache = vae.encode(still(pose[:1]))
    found = []
    for first in range(0, len(pose), POSE_CHUNK):
        latents, cache = vae.encode(still(pose[first : first + POSE_CHUNK]), cache)
        found.append(latents)
    return torch.cat(found, dim=2)


def _against(shot: Shot, told: Conditions) -> Conditions:
    """What guidance leads away from: the negative prompt and silence; reference, motion and pose stay."""
    return replace(told.drop("audio"), text=shot.negative.to(told.text))


def _clip_noise(like: Tensor, shot: Shot) -> Callable[[BlockSpan], Tensor]:
    """Noise of a block as the published pipeline draws it: a whole clip at once from a seed of its own."""
    latent_frames = shot.clip_frames // FRAMES_PER_LATENT

    def noise(span: BlockSpan) -> Tensor:
        clip, first = divmod(span.start, latent_frames)
        rng = torch.Generator().manual_seed(shot.seed + clip)
        drawn = torch.randn(like.shape[1], latent_frames, *like.shape[3:], generator=rng)
        return drawn[None, :, first : first + span.latent_frames].to(like.device)

    return noise


def _dtype(model: AvatarDiT) -> torch.dtype:
    return next(model.parameters()).dtype
