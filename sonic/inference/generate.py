"""The main job: a portrait and a recording become a talking video, frame by frame, in memory that does not grow with its length."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import torch
from tqdm import tqdm

from sonic.data.video import Coding, VideoWriter
from sonic.evaluation.metrics import peak_rss_gib
from sonic.inference.components import Parts, ReadyParts
from sonic.inference.generate_preview import film_moved
from sonic.inference.generate_wan import film_painted
from sonic.inference.inputs import Settings
from sonic.inference.report import Clock, Result, Watch, sampling_of, versions
from sonic.types import FrameChunk, Scene

FILMS = {"warp": film_moved, "wan": film_painted}  # by model.autoencoder


def film(scene: Scene, parts: Parts | ReadyParts, settings: Settings, *, clock: Clock | None = None) -> Iterator[FrameChunk]:
    """The frames of a scene, in order, as they are finished. Frame k is driven by the sound at k/fps s.

    Denoising and decoding run on threads of their own (decode.online), which end when the iterator is closed.
    """
    return FILMS[parts.config.autoencoder](scene, parts, settings, clock=clock or Clock())


def generate(scene: Scene, parts: Parts | ReadyParts, settings: Settings, *, output: Path, clock: Clock, watch: Watch) -> Result:
    """Film a scene into an MP4 that appears when it is complete; nothing is left of it after an error or Ctrl-C."""
    height, width = scene.portrait.pixels.shape[:2]
    begun, first_frame = clock.passed(), 0.0
    writer = VideoWriter(output, width, height, num_frames=scene.num_frames, speech=scene.speech, coding=Coding(fps=scene.fps))
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=scene.num_frames, unit=" frames", desc="film", dynamic_ncols=True, leave=False))
        stack.enter_context(writer)
        for chunk in stack.enter_context(closing(film(scene, parts, settings, clock=clock))):
            with clock.stage("write"):
                writer.write(chunk.pixels)
            first_frame = first_frame or clock.passed()
            watch.see(chunk)
            bar.update(len(chunk))
        with clock.stage("write"):
            stack.close()
    return Result(
        output=str(output.resolve()),
        frames=scene.num_frames,
        fps=scene.fps,
        audio_seconds=round(scene.speech.seconds, 3),
        frames_per_second=round(scene.num_frames / (clock.passed() - begun), 2),
        first_frame_s=round(first_frame, 3),
        peak_rss_gib=round(peak_rss_gib(), 3),
        peak_vram_gib=round(_peak_vram(parts.device) / 2**30, 3),
        stages_s={name: round(seconds, 3) for name, seconds in clock.seconds.items()},
        versions=versions(),
        sampling=sampling_of(settings.sampler, parts.weights, parts.dtype),
    )


def _peak_vram(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
