"""Generates the frames of a talking video and writes them as they are made, in memory that does not grow with the length."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import torch
from tqdm import tqdm

from sonic.data.video import Coding, VideoWriter
from sonic.evaluation.metrics import peak_rss_gib
from sonic.inference.components import Components
from sonic.inference.generate_preview import generate_preview
from sonic.inference.generate_wan import generate_wan
from sonic.inference.inputs import Settings
from sonic.inference.report import FrameRecorder, Result, StageTimer, sampling_of, versions
from sonic.types import FrameChunk, Inputs

GENERATORS = {"warp": generate_preview, "wan": generate_wan}  # by model.autoencoder


def generate(inputs: Inputs, components: Components, settings: Settings, *, timer: StageTimer | None = None) -> Iterator[FrameChunk]:
    """Yield the frames of a video in order, as soon as they are decoded. Frame k is driven by the sound at k/fps seconds.

    With decode.online, denoising and decoding run in background threads, which end when the iterator is closed.
    """
    return GENERATORS[components.config.autoencoder](inputs, components, settings, timer=timer or StageTimer())


def write_video(
    inputs: Inputs, components: Components, settings: Settings, *, output: Path, timer: StageTimer, recorder: FrameRecorder
) -> Result:
    """Generate a video and write it to an MP4, which appears only when it is complete; an error or Ctrl-C leaves no file behind."""
    height, width = inputs.portrait.pixels.shape[:2]
    begun, first_frame = timer.passed(), 0.0
    writer = VideoWriter(output, width, height, num_frames=inputs.num_frames, speech=inputs.speech, coding=Coding(fps=inputs.fps))
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=inputs.num_frames, unit=" frames", desc="video", dynamic_ncols=True, leave=False))
        stack.enter_context(writer)
        for chunk in stack.enter_context(closing(generate(inputs, components, settings, timer=timer))):
            with timer.stage("write"):
                writer.write(chunk.pixels)
            first_frame = first_frame or timer.passed()
            recorder.record(chunk)
            bar.update(len(chunk))
        with timer.stage("write"):
            stack.close()
    return Result(
        output=str(output.resolve()),
        frames=inputs.num_frames,
        fps=inputs.fps,
        audio_seconds=round(inputs.speech.seconds, 3),
        frames_per_second=round(inputs.num_frames / (timer.passed() - begun), 2),
        first_frame_s=round(first_frame, 3),
        peak_rss_gib=round(peak_rss_gib(), 3),
        peak_vram_gib=round(_peak_vram(components.device) / 2**30, 3),
        stages_s={name: round(seconds, 3) for name, seconds in timer.seconds.items()},
        versions=versions(),
        sampling=sampling_of(settings.sampler, components.weights, components.dtype),
        face=inputs.location,
    )


def _peak_vram(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
