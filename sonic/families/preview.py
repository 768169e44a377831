"""The preview: it moves a crop of the face, and the result is rendered into the full photograph. Its weights are in the package."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, astuple, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from sonic.checkpoint.bundled import BUNDLED, STUDENT, TEACHER, weight_files
from sonic.checkpoint.speech_weights import open_speech_encoder, speech_hash
from sonic.checkpoint.tensor_files import weights_hash
from sonic.checkpoint.weights import load_weights
from sonic.config import ModelConfig, require
from sonic.data.data_config import PrecomputeConfig
from sonic.data.faces import portrait_of
from sonic.data.image import cut, face_crop
from sonic.data.lips import close_mouth
from sonic.data.motion import encode_motion
from sonic.data.pixels import to_bytes, to_signed
from sonic.data.segments import Segment
from sonic.data.shards import Encoders
from sonic.encoders.speech_encoder import SpeechEncoder
from sonic.families.family import WINDOWS_ONLY, Family, refuse_unread
from sonic.geometry import FRAMES_PER_LATENT, BlockSpan, plan_blocks
from sonic.inference.components import Components
from sonic.inference.distributed_rollout import distributed_rollout
from sonic.inference.fit_picture import fit_portrait
from sonic.inference.infer_config import InferConfig
from sonic.inference.inputs import InMemory, Settings, video_length
from sonic.inference.live_features import LiveFeatures
from sonic.inference.motion_config import HeadConfig
from sonic.inference.post_process import process_motion
from sonic.inference.report import StageTimer
from sonic.inference.rollout import NoiseSource, Sampling, seeded
from sonic.inference.stream import decode_motion, half_the_threads, hand_over, prefetch, render_motion, with_events
from sonic.parallel.context import DistributedContext
from sonic.synthetic.draw_face import head_motion
from sonic.system.device_stream import current_stream
from sonic.types import Conditions, FrameChunk, Inputs, Portrait
from sonic.vae.head import MovingHead
from sonic.vae.motion_vae import Reference, WarpAutoencoder
from sonic.vae.warp import Canvas

log = logging.getLogger("sonic.inference")
WIDEST_CROP = 0.4  # face.expand_ratio above which the mouth is so small in the crop that the model paints one beside it


@dataclass
class PreviewComponents(Components):
    """The components of a preview model, whose speech encoder stays in memory."""

    speech: SpeechEncoder = field(kw_only=True)


class EncodedPortrait(NamedTuple):
    """The encoded inputs of a preview video: what the transformer and the autoencoder read, and the photograph that is drawn over."""

    conditions: Conditions
    spans: Iterator[BlockSpan]
    reference: Reference
    canvas: Canvas


class Preview(Family):
    """Models whose latents are the motion of a face in the photograph."""

    loads_late = False

    def open(self, config: InferConfig, memory: InMemory) -> Inputs:
        """The inputs of a preview video, in whose photograph a face must be found or given.

        Raises ValueError for options that only published models read, and without a face.
        """
        why = f"model={config.model.name} moves one face and follows no video; use a published model"
        refuse_unread(config, ("motion.pose", "face.masks", "video.compat"), why)
        refuse_unread(config, WINDOWS_ONLY, f"only model=sonic_svd reads it, not {config.model.name}; leave it out")
        if config.prompt:
            log.warning("prompt is not read: the preview was trained without text")
        if config.motion.motion_scale != 1 and config.motion.head == "off":
            log.warning("motion.motion_scale=%g has no effect: the head is still; motion.head=gentle moves it", config.motion.motion_scale)
        speech = memory.speech_of(config)
        portrait = portrait_of(memory.picture_of(config), config.face.box, config.face.mouth)
        location = {"face_box": astuple(portrait.face), "face.mouth": astuple(portrait.mouth)}
        log.info(" ".join(f"{option}=[{','.join(f'{value:.10g}' for value in values)}]" for option, values in location.items()))
        if config.motion.head != "off" and portrait.eyes is None:
            log.warning(f"motion.head={config.motion.head}: no eyes are seen in face_box, so the head moves and the eyes do not blink")
        if config.face.expand_ratio > WIDEST_CROP:
            fault = "the preview, which was trained at 0.3, paints mouths wider than the lips"
            log.warning("face.expand_ratio=%g: %s; use %g or less", config.face.expand_ratio, fault, WIDEST_CROP)
        location["crop"] = asdict(face_crop(portrait, config.face.expand_ratio, config.model.resolution))
        fitted, frames = close_mouth(fit_portrait(portrait, config.video)), video_length(config, memory, speech)
        return Inputs(fitted, speech, frames, config.seed, location=location)

    def transformer_weights(self, config: ModelConfig) -> Path:
        """The file that model.weights names, or the bundled one. Raises ValueError when it does not exist."""
        file = weight_files(config).dit
        way_out = "name those of a training as weights=FILE, or use model=preview"
        require(file.parent != BUNDLED or file.is_file(), f"model={config.name} has no weights in the package; {way_out}")
        return file

    def student(self, config: ModelConfig, steps: int) -> Path | None:
        """The bundled adapters distilled for `steps` sampling steps; None when there are none or the user chose other weights.

        With model.weights=student, the nearest smaller number of steps is used instead, and ValueError is raised when there is none.
        """
        if config.weights not in ("", STUDENT) or config.lora.path:
            return None
        students = _students(config)
        if config.weights == "" or steps in students:
            return students.get(steps)
        if fewer := [number for number in students if number < steps]:
            return students[max(fewer)]
        raise ValueError(
            f"model.weights={STUDENT}: no bundled student of model={config.name} for sampler.sample_steps={steps}; "
            f"use {f'sampler.sample_steps={min(students)} or more' if students else 'another model'}, or weights={TEACHER}"
        )

    def weights_in_words(self, config: ModelConfig, steps: int) -> str:
        """The weight files, with a note when no student has learnt `steps` steps and the user did not choose the weights."""
        files = super().weights_in_words(config, steps)
        if config.weights or config.lora.path or self.student(config, steps):
            return files
        learnt = ", ".join(map(str, sorted(_students(config)))) or "none"
        return f"{files} without adapters (no bundled student has learnt {steps} steps; there are those of: {learnt})"

    def components(self, config: ModelConfig, context: DistributedContext, dtype: torch.dtype) -> PreviewComponents:
        """The autoencoder and the speech encoder, loaded."""
        autoencoder, speech = _encoders(config, weight_files(config).autoencoder, context.world.device)
        return PreviewComponents(config, context, lambda: autoencoder, dtype=dtype, speech=speech)

    def preload_prompts(self, components: PreviewComponents, prompts: Iterable[str]) -> None:
        """Nothing, because the preview reads no prompts."""

    @torch.no_grad()
    def condition(self, inputs: Inputs, components: PreviewComponents, settings: Settings) -> EncodedPortrait:
        """Encode the face crop, and the speech for all frames unless the sound is still arriving."""
        components.load()
        config, device, options = components.config, components.device, settings.config
        crop = face_crop(inputs.portrait, options.face.expand_ratio, config.resolution)
        poses = head_poses(options.motion, inputs.num_frames, seed=inputs.seed)
        head = None if poses is None else MovingHead(inputs.portrait, crop, _displayed(poses, options.post.interpolate))
        canvas = Canvas(inputs.portrait, crop, head, dynamic_scale=options.motion.dynamic_scale)
        reference = components.autoencoder.reference(rearrange(cut(inputs.portrait.pixels, crop), "c h w -> 1 c h w").to(device))
        text = torch.zeros(1, config.text.text_len, config.text.text_dim, device=device)
        known = Conditions(ref=reference.latents, text=text).to(dtype=components.dtype)
        if settings.sound is not None:
            live = LiveFeatures(settings.sound, components.speech)
            return EncodedPortrait(live.conditions(known), live.spans(config.rollout.block_frames), reference, canvas)
        step = FRAMES_PER_LATENT * config.rollout.block_frames
        frames = math.ceil(inputs.num_frames / step) * step  # whole blocks
        features = components.speech.encode_audio(inputs.speech.samples, frames)
        whole = replace(known, audio=rearrange(features, "n a f -> 1 n a f")).to(device=device, dtype=components.dtype)
        return EncodedPortrait(whole, plan_blocks(inputs.num_frames, config.rollout.block_frames), reference, canvas)

    def generate(
        self, inputs: Inputs, encoded: EncodedPortrait, components: PreviewComponents, *, settings: Settings, timer: StageTimer
    ) -> Iterator[FrameChunk]:
        """Yield the frames of a video: the photograph at full resolution, changed only where the model moves it."""
        conditions, spans, reference, canvas = encoded
        sampling = Sampling(settings.config.sampler, NoiseSource(settings.generator or seeded(inputs.seed)), on_step=settings.on_step)
        blocks = distributed_rollout(components.model, conditions, spans, sampling=sampling, context=components.context)
        decode, prepare = settings.config.decode, half_the_threads()
        latents = hand_over(
            timer.each("denoise", with_events(blocks), current_stream(components.device)), decode, name="denoise", prepare=prepare
        )
        frames_left = (settings.sound or inputs).frames_left
        motion = decode_motion(latents, frames_left, autoencoder=components.autoencoder, reference=reference, timer=timer)
        chunks = render_motion(process_motion(motion, settings.config.post, inputs.fps), canvas, timer=timer)
        if decode.online:
            chunks = prefetch(chunks, 1, name="decode", prepare=prepare)
        with closing(latents), closing(chunks):
            yield from chunks

    def clip_encoders(self, config: PrecomputeConfig) -> Encoders:
        """The speech encoder and the autoencoder; there is no text encoder."""
        file = Path(config.autoencoder) if config.autoencoder else weight_files(config.model).autoencoder
        autoencoder, speech = _encoders(config.model, file, torch.device("cpu"))
        hashes, fps = self.encoder_hashes(config.model, config.autoencoder), config.model.rollout.fps
        return Encoders(speech.encode_audio, autoencoder, None, hashes, fps, frame=_face_crops, encode=partial(_encode, autoencoder))

    def encoder_hashes(self, config: ModelConfig, autoencoder: str = "") -> dict[str, str]:
        """Hashes of the tensors in the weight files."""
        files = weight_files(config)
        file, own = Path(autoencoder) if autoencoder else files.autoencoder, {"logmel": weights_hash(files.speech)}
        return {"autoencoder_hash": weights_hash(file), "speech_hash": speech_hash(config, own)}


def _students(config: ModelConfig) -> dict[int, Path]:
    """The bundled adapter files of a model, keyed by the number of sampling steps they were distilled for."""
    names = ((re.fullmatch(rf"{re.escape(config.name)}_(\d+)step", path.stem), path) for path in BUNDLED.glob("*.safetensors"))
    return {int(found[1]): path for found, path in names if found}


def _encoders(config: ModelConfig, file: Path, device: torch.device) -> tuple[WarpAutoencoder, SpeechEncoder]:
    """The autoencoder with the weights in `file`, and the speech encoder, on a device."""
    autoencoder = WarpAutoencoder().to(device).eval().requires_grad_(False)
    load_weights(autoencoder, file)
    return autoencoder, open_speech_encoder(config, {"logmel": weight_files(config).speech})(device)


def head_poses(motion: HeadConfig, num_frames: int, *, seed: int) -> Tensor | None:
    """Poses [F,4] of a random head motion that starts in the pose of the photograph; None without head motion."""
    if motion.head == "off":
        return None
    track = head_motion(np.random.default_rng([seed, 1]), num_frames, motion.motion_scale)
    settle_in = 1 - torch.exp(-torch.arange(num_frames) / 12.5)  # from the photograph's pose, time constant 0.5 s
    track[:, :3] *= rearrange(settle_in, "f -> f 1")
    return track


def _displayed(poses: Tensor, times: int) -> Tensor:
    """The poses of all frames that are displayed, `times` as many as the model makes.  [F,4] -> [times·F,4]"""
    after = torch.cat([poses[1:], poses[-1:]])
    return torch.cat([torch.lerp(poses, after, step / times).unsqueeze(1) for step in range(times)], 1).flatten(0, 1)


def _face_crops(pictures: list[np.ndarray], portrait: Portrait, config: PrecomputeConfig) -> Tensor:
    """Frames of the face crop, as in the command infer."""
    crop = face_crop(portrait, resolution=config.model.resolution)
    shown = torch.stack([cut(frame, crop) for frame in pictures])
    return rearrange(to_bytes(shown), "f c h w -> f h w c")


@torch.no_grad()
def _encode(autoencoder: WarpAutoencoder, segment: Segment) -> dict[str, Tensor]:
    """Motion latents of the face."""
    frames = to_signed(rearrange(segment.pixels[1:], "f h w c -> f c h w"))
    return encode_motion(autoencoder, frames, frames[segment.rest])
