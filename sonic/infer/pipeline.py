"""The main job: a portrait and a recording become a talking video, frame by frame, in memory that does not grow with its length."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

import skimage
import torch
from tqdm import tqdm

from sonic.config import DecodeConfig, HeadConfig, InferConfig, SamplerConfig
from sonic.data.portrait import face_crop, load_portrait
from sonic.data.speech import load_speech
from sonic.data.video import VideoWriter
from sonic.geometry import FPS, frames_of_audio, plan_blocks
from sonic.infer.build import BUNDLED, Parts
from sonic.infer.conditions import encode, fit_portrait
from sonic.infer.decode import HANDOVERS, ahead, decoded
from sonic.infer.report import Clock, Result, Watch, versions
from sonic.infer.rollout import Draws, rollout
from sonic.model.warp import Canvas
from sonic.types import FrameChunk, Scene

PORTRAITS = {"astronaut": Path(skimage.__file__).parent / "data" / "astronaut.png"}
RECORDINGS = {"sample": BUNDLED / "sample_speech.flac"}


@dataclass(frozen=True)
class Settings:
    """How a scene is filmed."""

    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    motion: HeadConfig = field(default_factory=HeadConfig)
    expand_ratio: float = 1.6


def open_scene(config: InferConfig) -> Scene:
    """Read and check portrait and recording. Raises ValueError in one sentence for everything that is wrong with them."""
    speech = load_speech(RECORDINGS.get(config.audio, config.audio))
    portrait = load_portrait(PORTRAITS.get(config.image, config.image), config.face.box, config.face.mouth)
    frames = frames_of_audio(len(speech.samples), speech.sample_rate)
    most = config.video.max_frames or frames
    return Scene(fit_portrait(portrait, config.video.size), speech, min(frames, most), config.seed)


def film(scene: Scene, parts: Parts, settings: Settings, *, clock: Clock | None = None) -> Iterator[FrameChunk]:
    """The frames of a scene, in order, as they are finished. Frame k is driven by the sound at k/25 s.

    Denoising and decoding run on threads of their own (decode.online), which end when the iterator is closed.
    """
    clock = clock or Clock()
    with clock.stage("encode"):
        crop = face_crop(scene.portrait, settings.expand_ratio, parts.config.resolution)
        conditions, reference = encode(scene, parts, settings.motion, crop=crop)
        canvas = Canvas(torch.from_numpy(scene.portrait.pixels), crop)
    spans = plan_blocks(scene.num_frames, parts.config.rollout.block_frames)
    rng = torch.Generator().manual_seed(scene.seed)
    blocks = rollout(parts.model, conditions, spans, sampler=settings.sampler, draws=Draws(rng))
    online = settings.decode.online
    stage = {"prepare": _half_the_threads} if online else {}
    latents = HANDOVERS[online](clock.each("denoise", blocks), settings.decode.queue, name="denoise", **stage)
    chunks = decoded(latents, scene.num_frames, autoencoder=parts.autoencoder, reference=reference, canvas=canvas, clock=clock)
    if online:
        chunks = ahead(chunks, 1, name="decode", **stage)
    with closing(latents), closing(chunks):
        yield from chunks


def generate(scene: Scene, parts: Parts, settings: Settings, *, output: Path, clock: Clock, watch: Watch) -> Result:
    """Film a scene into an MP4 that appears when it is complete; nothing is left of it after an error or Ctrl-C."""
    height, width = scene.portrait.pixels.shape[:2]
    begun, first_frame = clock.passed(), 0.0
    writer = VideoWriter(output, width, height, num_frames=scene.num_frames, speech=scene.speech)
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
        fps=FPS,
        audio_seconds=round(scene.speech.seconds, 3),
        frames_per_second=round(scene.num_frames / (clock.passed() - begun), 2),
        first_frame_s=round(first_frame, 3),
        peak_rss_gib=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
        peak_vram_gib=round(_peak_vram(parts.device) / 2**30, 3),
        stages_s={name: round(seconds, 3) for name, seconds in clock.seconds.items()},
        versions=versions(),
    )


def _half_the_threads() -> None:
    """Two stages work at once, each with half of torch's threads: so they wait for each other less."""
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))


def _peak_vram(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
