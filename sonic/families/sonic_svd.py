"""Sonic as published: a UNet that denoises windows of 12.5 frames per second, in which a whole portrait follows a recording."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import astuple, dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from sonic.checkpoint.sonic_checkpoint import SonicCheckpoint
from sonic.config import ModelConfig, RunConfig, SamplerConfig, VideoConfig
from sonic.data.data_config import PrecomputeConfig
from sonic.data.faces import FaceFinder, checked_box, find_speaker
from sonic.data.pixels import to_bytes
from sonic.data.shards import Encoders
from sonic.encoders.clip_sound import ClipSoundEncoder
from sonic.families.family import Family, refuse_unread
from sonic.geometry import FPS
from sonic.inference.components import Components, lora_of
from sonic.inference.decode_windows import decode_clip, shown_frames
from sonic.inference.denoise_windows import ClipConditions, WindowSampling, clip_noise
from sonic.inference.distributed_windows import ClipRequest, distributed_denoise, serve_clips
from sonic.inference.fit_picture import wan_video_size
from sonic.inference.infer_config import InferConfig
from sonic.inference.inputs import InMemory, Settings
from sonic.inference.post_process import numbered, process_pixels
from sonic.inference.report import StageTimer
from sonic.inference.rollout import seeded
from sonic.inference.svd_clips import svd_clip_encoders, svd_encoder_hashes
from sonic.inference.svd_picture import SvdPicture, published_svd_size
from sonic.model.svd_unet import SvdUNet
from sonic.parallel.context import DistributedContext
from sonic.parallel.parallelize_unet import build_parallel_unet
from sonic.sampling.karras import karras_sigmas, timestep_of
from sonic.system.device_stream import current_stream
from sonic.system.program import written
from sonic.types import FaceBox, FrameChunk, Inputs, Portrait, Speech
from sonic.vae.rife import Rife

log = logging.getLogger("sonic.inference")
MODEL_FPS = FPS / 2  # the model makes every other frame
PUBLISHED_FRAMES = 5000  # the longest clip of the published program, which cuts a longer one: 400 s
LARGEST = 1024  # px: the largest short side that the model is published for
UNREAD = (
    *("face.mouth", "face.expand_ratio", "face.masks", "motion.pose", "motion.head", "motion.motion_scale"),
    "run.attention",
)


@dataclass
class SonicComponents(Components):
    """The components of a published Sonic, whose checkpoint loads its encoders one at a time; RIFE is loaded when it is first needed."""

    checkpoint: SonicCheckpoint = field(kw_only=True)
    rife: Rife | None = None

    def speech(self) -> ClipSoundEncoder:
        """Whisper and the networks of audio tokens and motion buckets, of the checkpoint or, with model.lora.path, of a training."""
        found = self.checkpoint.speech(self.device)
        lora_of(self.config.lora).replace_beside({"audio2token": found.tokens, "audio2bucket": found.buckets})
        return found

    def begin_video(self, seconds: float) -> None:
        """Load what is not loaded; the UNet has no regions to compile."""
        self.load()
        self.videos += 1


@dataclass(frozen=True)
class SonicInputs(Inputs):
    """The inputs of a video, with the number of frames that the model makes, and what its networks see of the photograph."""

    clip_frames: int = field(kw_only=True)
    picture: SvdPicture = field(kw_only=True)


class EncodedClip(NamedTuple):
    """The encoded inputs of a video, and the noise from which it is made, float32 [n,4,h,w]."""

    conditions: ClipConditions
    noise: Tensor


class SonicSvd(Family):
    """Models of the checkpoint that Sonic was published with."""

    loads_late = True

    def open(self, config: InferConfig, memory: InMemory) -> SonicInputs:
        """The inputs of a video, in whose photograph a face is found or given, unless face.missing=whole.

        Raises ValueError for options that this family does not read, and for sound that is still arriving.
        """
        _refuse_options(config, memory)
        video, upstream = config.video, bool(config.video.compat)
        speech, pixels = memory.speech_of(config), memory.picture_of(config)
        frames, face = _clip_frames(video, speech), _face_of(pixels, config)
        wide, high = pixels.shape[1::-1]
        size = published_svd_size(wide, high, video.min_resolution) if upstream else wan_video_size(wide, high, video)
        picture = SvdPicture.of(pixels, face, size, upstream=upstream)
        shown = rearrange(to_bytes(picture.ref), "c h w -> h w c").contiguous().numpy()
        doubled = video.interpolate == "rife"
        return SonicInputs(
            portrait=Portrait(shown),
            speech=speech,
            num_frames=shown_frames(frames, upstream=upstream) if doubled else frames,
            seed=config.seed,
            fps=FPS if doubled else MODEL_FPS,
            location={} if face is None else {"face_box": astuple(face)},
            clip_frames=frames,
            picture=picture,
        )

    def settled_model(self, config: ModelConfig) -> ModelConfig:
        """The config with the sizes of its checkpoint. Raises ValueError without a checkpoint, or when it is of another model."""
        return _checkpoint(config).config(config)

    def transformer_weights(self, config: ModelConfig) -> Path:
        """The file of the UNet in the checkpoint."""
        return _checkpoint(config).unet_weights

    def timesteps(self, sampler: SamplerConfig) -> list[float]:
        """ln(sigma) / 4 of the noise levels."""
        return [timestep_of(sigma) for sigma in karras_sigmas(sampler.sample_steps)[:-1].tolist()]

    def build_model(self, config: ModelConfig, run: RunConfig, *, context: DistributedContext, dtype: torch.dtype, steps: int) -> SvdUNet:
        """The UNet with its weights, under the plan of `context`."""
        weights, lora = self.transformer_weights(config), lora_of(config.lora)
        return build_parallel_unet(config.unet, weights, context, dtype=dtype, lora=lora)

    def serve(self, components: SonicComponents) -> None:
        """On a rank that does not lead: evaluate its windows of the leading rank's clips until it is shut down."""
        serve_clips(components.model, components.context)

    def components(self, config: ModelConfig, context: DistributedContext, dtype: torch.dtype) -> SonicComponents:
        """The checkpoint and a function that loads the VAE; nothing is loaded yet."""
        checkpoint = _checkpoint(config)
        make_autoencoder = partial(checkpoint.autoencoder, context.world.device, dtype)
        return SonicComponents(checkpoint.config(config), context, make_autoencoder, dtype=dtype, checkpoint=checkpoint)

    def preload_prompts(self, components: SonicComponents, prompts: Iterable[str]) -> None:
        """Nothing, because the model reads no prompts."""

    @torch.no_grad()
    def condition(self, inputs: SonicInputs, components: SonicComponents, settings: Settings) -> EncodedClip:
        """Encode picture and recording, whose encoders are freed again, and draw the noise."""
        picture, checkpoint, device, dtype = inputs.picture, components.checkpoint, components.device, components.dtype
        embed = checkpoint.image_encoder(device, dtype)(picture.clip_pixels[None].to(device, dtype))[0].float()
        sound = components.speech()(inputs.speech.samples, inputs.clip_frames, embed)
        components.load()
        latents = components.autoencoder.encode(picture.ref[None].to(device))[0].float()
        generator, (_, height, width) = settings.generator or seeded(inputs.seed), picture.ref.shape
        _, noise = clip_noise(generator, inputs.clip_frames, height=height, width=width)
        mask = picture.face_mask[None].to(device, dtype)
        conditions = ClipConditions(latents, sound.tokens.to(dtype), sound.silence.to(dtype), sound.buckets, embed, mask)
        return EncodedClip(conditions, noise.to(device))

    def generate(
        self, inputs: SonicInputs, encoded: EncodedClip, components: SonicComponents, *, settings: Settings, timer: StageTimer
    ) -> Iterator[FrameChunk]:
        """Yield the frames of a video: the clip is denoised whole, then decoded piece by piece."""
        options, on_step = settings.config, settings.on_step
        report = on_step and (lambda step, timestep, latents: on_step(0, step, timestep))
        with timer.stage("denoise", current_stream(components.device)):
            request = ClipRequest(encoded.conditions, encoded.noise, _sampling(options, components.config))
            latents = distributed_denoise(components.model, request, components.context, on_step=report)
        if options.video.interpolate == "rife" and components.rife is None:
            components.rife = components.checkpoint.rife(components.device)
        rife = components.rife if options.video.interpolate == "rife" else None
        upstream = bool(options.video.compat)
        chunks = decode_clip(latents, components.autoencoder, rife, decode=options.decode, timer=timer, upstream=upstream)
        with closing(chunks):
            yield from numbered(process_pixels(chunks, options.post, inputs.fps))

    def clip_encoders(self, config: PrecomputeConfig) -> Encoders:
        """The encoders of its checkpoint, for clips of one's own videos."""
        return svd_clip_encoders(_checkpoint(config.model), config)

    def encoder_hashes(self, config: ModelConfig, autoencoder: str = "") -> dict[str, str]:
        """The hashes of the files that the encoders were converted from."""
        return svd_encoder_hashes(_checkpoint(config)) if config.weights else {}


def _checkpoint(config: ModelConfig) -> SonicCheckpoint:
    """The converted checkpoint of a model. Raises ValueError when none is named or it is of another model."""
    if not config.weights:
        raise ValueError(
            f"model={config.name} has no bundled weights: it needs checkpoint=FOLDER, made by {written('convert')} source=FOLDER "
            f"model={config.name} of the folder that Sonic is downloaded as; model=preview needs nothing"
        )
    return SonicCheckpoint.open(Path(config.weights))


def _refuse_options(config: InferConfig, memory: InMemory) -> None:
    """Raise ValueError for sound that is still arriving and for options that this family does not read."""
    name, sampler, video = config.model.name, config.sampler, config.video
    if memory.sound is not None:
        raise ValueError(f"model={name} denoises the whole clip at once and needs its sound whole; give audio as a file, or as samples")
    refuse_unread(config, UNREAD, f"model={name} is a UNet that moves the portrait by its sound alone and reads no such option")
    if config.run.compile == "true":
        raise ValueError(f"run.compile=true: the UNet of model={name} is not compiled; leave it out")
    if (sampler.name, sampler.schedule) != ("euler", "karras"):
        given = f"sampler.name={sampler.name} sampler.schedule={sampler.schedule}"
        raise ValueError(f"{given}: model={name} is sampled by euler from the noise levels karras; use sampler=sonic")
    if not 0 < video.min_resolution <= LARGEST:
        given = f"video.min_resolution={video.min_resolution}" if video.min_resolution else f"video.size={video.size}"
        raise ValueError(f"{given}: model={name} makes videos whose short side is 384 to {LARGEST} pixels; use video.min_resolution=512")
    if config.prompt or sampler.negative_prompt:
        log.warning("prompts are not read: model=%s was trained without text", name)


def _clip_frames(video: VideoConfig, speech: Speech) -> int:
    """The number of frames that the model makes for a recording, of 80 ms each: the shortest recording has two."""
    frames = len(speech.samples) * FPS // speech.sample_rate // 2
    if video.compat and frames > PUBLISHED_FRAMES:
        log.warning("video.compat=upstream: the video ends after %g s, as in the published program", PUBLISHED_FRAMES / MODEL_FPS)
        frames = PUBLISHED_FRAMES
    return min(frames, max(1, video.num_clip * video.infer_frames // 2)) if video.num_clip else frames


def _face_of(pixels: np.ndarray, config: InferConfig) -> FaceBox | None:
    """The face in a photograph, given or found; None for the whole picture. Raises ValueError without a face."""
    if config.face.box is not None:
        return checked_box(pixels, config.face.box)
    try:
        face = find_speaker(
            pixels, FaceFinder(), way_out="or give face_box=[x,y,w,h] in its pixels, or face.missing=whole to let the sound move all of it"
        ).box
    except ValueError as error:
        if config.face.missing != "whole":
            raise
        log.warning("%s; face.missing=whole: the sound moves the whole picture", str(error).partition(";")[0])
        return None
    return FaceBox(*(round(value, 2) for value in astuple(face)))  # as it is logged and can be given


def _sampling(config: InferConfig, model: ModelConfig) -> WindowSampling:
    """How a clip is sampled, from the options of a video."""
    sampler = config.sampler
    return WindowSampling(
        steps=sampler.sample_steps,
        sample_guide_scale=(sampler.sample_guide_scale,) * 2,
        audio_guide_scale=(sampler.audio_guide_scale,) * 2,
        dynamic_scale=config.motion.dynamic_scale,
        fps=MODEL_FPS,
        windows=model.unet,
    )
