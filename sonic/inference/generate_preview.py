"""Films whose photograph is moved: the model works on a crop of the face, and what it changes is put back at full resolution."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import torch

from sonic.data.image import face_crop
from sonic.geometry import plan_blocks
from sonic.inference.components import Parts
from sonic.inference.conditions import encode
from sonic.inference.distributed_rollout import distributed_rollout
from sonic.inference.inputs import Settings
from sonic.inference.report import Clock
from sonic.inference.rollout import NoiseSource, Sampling
from sonic.inference.stream import HANDOVERS, ahead, decoded, half_the_threads
from sonic.types import FrameChunk, Scene
from sonic.vae.warp import Canvas


def film_moved(scene: Scene, parts: Parts, settings: Settings, *, clock: Clock) -> Iterator[FrameChunk]:
    """The frames of a scene, each the untouched photograph but for what the model moves."""
    with clock.stage("encode"):
        crop = face_crop(scene.portrait, settings.expand_ratio, parts.config.resolution)
        conditions, reference = encode(scene, parts, settings.motion, crop=crop)
        canvas = Canvas(torch.from_numpy(scene.portrait.pixels), crop)
    spans = plan_blocks(scene.num_frames, parts.config.rollout.block_frames)
    rng = torch.Generator().manual_seed(scene.seed)
    sampling = Sampling(settings.sampler, NoiseSource(rng))
    blocks = distributed_rollout(parts.model, conditions, spans, sampling=sampling, context=parts.context)
    online = settings.decode.online
    stage = {"prepare": half_the_threads()} if online else {}
    latents = HANDOVERS[online](clock.each("denoise", blocks), settings.decode.queue, name="denoise", **stage)
    chunks = decoded(latents, scene.num_frames, autoencoder=parts.autoencoder, reference=reference, canvas=canvas, clock=clock)
    if online:
        chunks = ahead(chunks, 1, name="decode", **stage)
    with closing(latents), closing(chunks):
        yield from chunks
