"""Generates the frames of a talking video and writes them as they are made, in memory that does not grow with the length."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import torch
from tqdm import tqdm

from sonic.data.video import VideoWriter
from sonic.evaluation.metrics import peak_rss_gib
from sonic.families.family import family_of
from sonic.geometry import GIB
from sonic.inference.components import Components
from sonic.inference.infer_config import InferConfig
from sonic.inference.inputs import Settings
from sonic.inference.post_process import as_displayed
from sonic.inference.report import FrameRecorder, Result, StageTimer, sampling_of
from sonic.inference.sound_offset import SoundOffset
from sonic.model.compile import COMPILE_TIME
from sonic.types import FrameChunk, Inputs


def generate(inputs: Inputs, components: Components, settings: Settings, *, timer: StageTimer | None = None) -> Iterator[FrameChunk]:
    """Yield the frames of a video in order, as soon as they are decoded. Frame k is driven by the sound at k/fps seconds, where
    fps is the model's times post.interpolate.

    With decode.online, denoising and decoding run in background threads, which end when the iterator is closed.
    """
    family, timer = family_of(components.config), timer or StageTimer()
    with timer.stage("encode"):
        encoded = family.condition(inputs, components, settings)
    with timer.stage("load"):
        length = inputs.num_frames / inputs.fps if settings.sound is None else 0  # a live video is not to wait for the compiler
        components.begin_video(length)
    with timer.compiling(COMPILE_TIME):
        yield from family.generate(inputs, encoded, components, settings=settings, timer=timer)


def make_video(
    inputs: Inputs, components: Components, config: InferConfig, *, output: Path, timer: StageTimer
) -> tuple[Result, FrameRecorder]:
    """Generate a video and write it to an MP4, which appears only when it is complete; an error or Ctrl-C leaves no file behind.

    Returns its result, and the recorder that holds sample frames and the mouth curve.
    """
    displayed = as_displayed(inputs, config.post)
    recorder, offset = FrameRecorder(displayed), SoundOffset(displayed, config.post)
    height, width = inputs.portrait.pixels.shape[:2]
    begun, first_frame = timer.passed(), 0.0
    speech = offset.speech if config.post.lip_align else offset.speech()
    writer = VideoWriter(output, width, height, num_frames=displayed.num_frames, speech=speech, fps=displayed.fps)
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=displayed.num_frames, unit=" frames", desc="video", dynamic_ncols=True, leave=False))
        stack.enter_context(writer)
        for chunk in stack.enter_context(closing(generate(inputs, components, Settings(config), timer=timer))):
            with timer.stage("write"):
                writer.write(chunk.pixels)
            first_frame = first_frame or timer.passed()
            recorder.record(chunk)
            offset.record(chunk)
            bar.update(len(chunk))
        with timer.stage("write"):
            stack.close()
    peak_vram = torch.cuda.max_memory_allocated(components.device) if components.device.type == "cuda" else 0
    result = Result(
        output=str(output.resolve()),
        frames=displayed.num_frames,
        fps=displayed.fps,
        audio_seconds=round(inputs.speech.seconds, 3),
        frames_per_second=round(displayed.num_frames / (timer.passed() - begun), 2),
        first_frame_s=round(first_frame, 3),
        peak_rss_gib=round(peak_rss_gib(), 3),
        peak_vram_gib=round(peak_vram / GIB, 3),
        stages_s={name: round(seconds, 3) for name, seconds in timer.seconds.items()},
        sampling=sampling_of(
            config.sampler, components.weights, components.dtype, timesteps=family_of(components.config).timesteps(config.sampler)
        ),
        face=inputs.location,
        sound=offset.as_json(),
    )
    return result, recorder
