"""Generates videos with the preview model: it moves a crop of the face, and the result is rendered into the full photograph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import torch

from sonic.data.image import face_crop
from sonic.geometry import plan_blocks
from sonic.inference.components import Components
from sonic.inference.conditions import encode, encode_portrait
from sonic.inference.distributed_rollout import distributed_rollout
from sonic.inference.inputs import Settings
from sonic.inference.live_features import LiveFeatures, LiveLogMel
from sonic.inference.report import StageTimer
from sonic.inference.rollout import NoiseSource, Sampling
from sonic.inference.stream import HANDOVERS, decode_blocks, half_the_threads, prefetch
from sonic.types import FrameChunk, Inputs
from sonic.vae.warp import Canvas


def generate_preview(inputs: Inputs, components: Components, settings: Settings, *, timer: StageTimer) -> Iterator[FrameChunk]:
    """Yield the frames of a video: the photograph at full resolution, changed only where the model moves it."""
    with timer.stage("encode"):
        crop = face_crop(inputs.portrait, settings.expand_ratio, components.config.resolution)
        canvas = Canvas(torch.from_numpy(inputs.portrait.pixels), crop)
        if settings.sound is None:
            conditions, reference = encode(inputs, components, settings.motion, crop=crop)
            spans = plan_blocks(inputs.num_frames, components.config.rollout.block_frames)
        else:
            live = LiveFeatures(settings.sound, LiveLogMel(components.speech))
            known, reference = encode_portrait(inputs, components, crop=crop)
            conditions, spans = live.conditions(known), live.spans(components.config.rollout.block_frames)
    sampling = Sampling(settings.sampler, NoiseSource(settings.random(inputs.seed)), on_step=settings.on_step)
    blocks = distributed_rollout(components.model, conditions, spans, sampling=sampling, context=components.context)
    online = settings.decode.online
    stage = {"prepare": half_the_threads()} if online else {}
    latents = HANDOVERS[online](timer.each("denoise", blocks), settings.decode.queue, name="denoise", **stage)
    chunks = decode_blocks(latents, inputs.num_frames, autoencoder=components.autoencoder, reference=reference, canvas=canvas, timer=timer)
    if online:
        chunks = prefetch(chunks, 1, name="decode", **stage)
    with closing(latents), closing(chunks):
        yield from chunks if settings.sound is None else live.cut(chunks)
