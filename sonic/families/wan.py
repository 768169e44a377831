"""The published models, whose every pixel comes from the Wan VAE: Wan2.2-S2V clip by clip, Live Avatar block by block."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from sonic.checkpoint.converted import Checkpoint
from sonic.checkpoint.official import VAE_FILE
from sonic.checkpoint.speech_weights import MakeSpeechEncoder, open_speech_encoder, speech_hash
from sonic.config import ModelConfig
from sonic.data.audio import load_speech
from sonic.data.data_config import PrecomputeConfig
from sonic.data.image import covering, load_image
from sonic.data.motion import pose_motion
from sonic.data.pixels import signed, to_bytes, to_signed
from sonic.data.segments import Segment, covering_frames
from sonic.data.shards import Encoders
from sonic.data.video import frames_at
from sonic.encoders.wav2vec import Wav2VecEncoder, num_resampled, published_clips
from sonic.families.family import WINDOWS_ONLY, Family, refuse_unread
from sonic.geometry import FRAMES_PER_LATENT, PIXELS_PER_LATENT, WAN_MULTIPLE
from sonic.inference.components import Components, find_device
from sonic.inference.fit_picture import published_picture, wan_video_size
from sonic.inference.generate_wan import (
    DROPPED_FRAMES,
    BlocksWithEvents,
    EncodedInputs,
    WanNetworks,
    generate_blocks,
    generate_blocks_upstream,
    generate_clips,
)
from sonic.inference.infer_config import InferConfig
from sonic.inference.inputs import InMemory, Settings, at_duration, video_length
from sonic.inference.live_features import LiveFeatures
from sonic.inference.motion_config import HeadConfig
from sonic.inference.post_process import numbered, process_pixels
from sonic.inference.report import StageTimer
from sonic.inference.stream import FramesLeft, decoding_stream, hand_over
from sonic.parallel.context import DistributedContext
from sonic.system.device_stream import DeviceStream, current_stream, to_host
from sonic.system.program import written
from sonic.types import FrameChunk, Inputs, Portrait, Speech
from sonic.vae.wan_vae import WanAutoencoder
from sonic.vae.warp import move_further

log = logging.getLogger("sonic.inference")
WHITE = 127  # pixels of a mask above this level belong to the voice
SPEECH_FILES = ("model.safetensors", "pytorch_model.bin")  # file names of a published wav2vec


@dataclass
class WanComponents(Components):
    """The components of a published model, whose checkpoint loads its encoders one at a time."""

    checkpoint: Checkpoint = field(kw_only=True)
    speech: MakeSpeechEncoder = field(kw_only=True)


class Wan(Family):
    """Models of converted checkpoints, which generate the whole picture."""

    loads_late = True

    def open(self, config: InferConfig, memory: InMemory) -> Inputs:
        """The inputs of a Wan video, which generates the whole picture and needs no face in it.

        Raises ValueError for options of the preview, and for masks that do not fit the picture or the recordings.
        """
        why = f"model={config.model.name} generates the whole picture and looks for no face in it; leave it out, or use model=preview"
        refuse_unread(config, ("face.box", "face.mouth", "face.expand_ratio", "motion.head"), why)
        refuse_unread(config, WINDOWS_ONLY, f"only model=sonic_svd reads it, not {config.model.name}; leave it out")
        if config.motion.motion_scale != 1 and not config.motion.pose:
            log.warning(
                "motion.motion_scale=%g has no effect: the model moves the head by itself; motion.pose=VIDEO leads it",
                config.motion.motion_scale,
            )
        named = config.audio.split("+") if config.face.masks else ()
        voices = tuple(at_duration(load_speech(name), config.video) for name in named)
        speech = _mixed(voices) if voices else memory.speech_of(config)
        pixels = memory.picture_of(config)
        size = wan_video_size(*pixels.shape[1::-1], config.video)
        if min(size) > config.video.min_resolution > 0:
            sides = f"its sides are multiples of {WAN_MULTIPLE}, so the video is {size[0]}x{size[1]}"
            log.info("video.min_resolution=%d, model=%s: %s", config.video.min_resolution, config.model.name, sides)
        fit = published_picture if config.video.compat else covering
        picture = Portrait(fit(pixels, *size))
        length = _published_length(config, speech) if config.video.compat else video_length(config, memory, speech)
        inputs = Inputs(picture, speech, length, config.seed, config.video.fps, config.prompt, config.sampler.negative_prompt)
        masks = None
        if voices:
            masks = np.stack([fit(mask, *size)[..., 0] > WHITE for mask in _masks(config.face.masks, len(voices), pixels.shape)])
        return replace(inputs, voices=voices, masks=masks, pose=_poses(config.motion, inputs) if config.motion.pose else None)

    def settled_model(self, config: ModelConfig) -> ModelConfig:
        """The config with the sizes of its checkpoint. Raises ValueError without a checkpoint, or when it is of another model."""
        return _checkpoint(config).config(config)

    def transformer_weights(self, config: ModelConfig) -> Path:
        """The folder of the transformer in the checkpoint."""
        return _checkpoint(config).weights

    def components(self, config: ModelConfig, context: DistributedContext, dtype: torch.dtype) -> WanComponents:
        """The checkpoint and functions that load the VAE and the speech encoder; nothing is loaded yet."""
        checkpoint = _checkpoint(config)
        config = checkpoint.config(config)
        make_autoencoder = partial(checkpoint.autoencoder, context.world.device, vae_dtype(config, dtype))
        speech = open_speech_encoder(config, checkpoint.speech_encoders)
        return WanComponents(config, context, make_autoencoder, dtype=dtype, checkpoint=checkpoint, speech=speech)

    def preload_prompts(self, components: WanComponents, prompts: Iterable[str]) -> None:
        """Encode all prompts and cache them, so that the text encoder is not needed after the transformer is loaded.

        A prompt that cannot be encoded is skipped here; the error is reported when its video is made.
        """
        read = components.checkpoint.prompt_encoder(components.config.text.text_len, components.device)
        for prompt in dict.fromkeys(prompts):
            with suppress(ValueError, OSError):
                read(prompt)

    def condition(self, inputs: Inputs, components: WanComponents, settings: Settings) -> EncodedInputs:
        """Encode the inputs; the encoders are freed, but that of sound that is still arriving stays in memory.

        Speech features and poses cover the last block or clip to its end.
        """
        config, checkpoint, device = components.config, components.checkpoint, components.device
        options = settings.config
        whole = config.rollout.clip_frames or options.video.compat
        step = options.video.infer_frames if whole else FRAMES_PER_LATENT * config.rollout.block_frames
        if settings.sound is None:
            frames, live = -(-inputs.num_frames // step) * step, None
            voices = [voice.samples for voice in inputs.voices or (inputs.speech,)]
            features = components.speech(device).encode_audio_batch(voices, frames, inputs.fps)
        else:  # the speech encoder stays in memory until the sound ends
            live = LiveFeatures(settings.sound, components.speech(device))
            features = torch.zeros(1, 0, 0, 0)
        read = checkpoint.prompt_encoder(config.text.text_len, device)
        text = read(inputs.prompt)
        weights = _audio_weights(inputs, PIXELS_PER_LATENT * config.trunk.patch_size[1], options.motion.dynamic_scale)
        return EncodedInputs(
            picture=signed(inputs.portrait.pixels).to(device),
            text=text,
            negative=read(inputs.negative_prompt) if options.sampler.sample_guide_scale != 1 else text,
            audio=features,
            clip_frames=options.video.infer_frames,
            seed=inputs.seed,
            pose=None if inputs.pose is None else _lengthened(inputs.pose, frames),
            masks=None if weights is None else weights.to(device),
            generator=settings.generator,
            live=live,
        )

    def generate(
        self, inputs: Inputs, encoded: EncodedInputs, components: WanComponents, *, settings: Settings, timer: StageTimer
    ) -> Iterator[FrameChunk]:
        """Yield the frames of a video, clip by clip or block by block."""
        networks = WanNetworks(components.model, components.autoencoder, components.context)
        options, on_step, stage = settings.config, settings.on_step, timer.stage
        sampler, compat = options.sampler, options.video.compat

        denoising = stream = current_stream(components.device)

        def queued(blocks: BlocksWithEvents) -> BlocksWithEvents:
            return hand_over(timer.each("denoise", blocks, denoising), options.decode, name="denoise")

        if components.config.rollout.clip_frames:
            frames = generate_clips(networks, encoded, sampler=sampler, upstream=bool(compat), stage=stage, on_step=on_step)
        elif compat:
            frames = generate_blocks_upstream(networks, encoded, sampler=sampler, stage=stage, on_step=on_step)
        else:
            stream = decoding_stream(components.device)
            frames = generate_blocks(networks, encoded, sampler=sampler, hand_over=queued, stage=stage, on_step=on_step)
        with closing(frames):
            chunks = _chunks(frames, (settings.sound or inputs).frames_left, stream, timer=timer)
            yield from numbered(process_pixels(chunks, options.post, inputs.fps))

    def clip_encoders(self, config: PrecomputeConfig) -> Encoders:
        """The encoders of the model, on the machine's accelerator if it has one."""
        checkpoint, device = _checkpoint(config.model), find_device("auto")
        model, fps = checkpoint.config(config.model), config.model.rollout.fps
        if not config.data.source:
            raise ValueError(f"model={config.model.name} learns from videos: name a folder of them as data.source=FOLDER")
        length, speech = model.text.text_len, open_speech_encoder(model, checkpoint.speech_encoders)
        rows, autoencoder = checkpoint.prompt_encoder(length, device), checkpoint.autoencoder(device, torch.float32)
        return Encoders(
            encode_audio=lambda samples, frames: speech(device).encode_audio(samples, frames, fps),
            autoencoder=autoencoder,
            read=lambda prompt: F.pad(found := rows(prompt)[0].cpu(), (0, 0, 0, length - len(found))),
            hashes=self.encoder_hashes(config.model),
            fps=fps,
            frame=covering_frames,
            encode=partial(_encode, autoencoder),
        )

    def encoder_hashes(self, config: ModelConfig, autoencoder: str = "") -> dict[str, str]:
        """The digests of the files that the VAE and the checkpoint's own speech encoder were converted from, or of model.speech_weights."""
        hash_of = _checkpoint(config).source_hash if config.weights else lambda *names: ""
        own = {"wav2vec2": hash_of(*SPEECH_FILES)[:16]}
        return {"autoencoder_hash": hash_of(VAE_FILE)[:16], "speech_hash": speech_hash(config, own)}


def vae_dtype(config: ModelConfig, dtype: torch.dtype) -> torch.dtype:
    """The precision of the VAE beside a transformer in `dtype`.

    It is float32 for whole clips, because the last frames of each clip are encoded again for the next one; for a stream it is `dtype`,
    because the KV rings need the memory.
    """
    return torch.float32 if config.rollout.clip_frames else dtype


def _checkpoint(config: ModelConfig) -> Checkpoint:
    """The converted checkpoint of a model. Raises ValueError when none is named or it is of another model."""
    if not config.weights:
        raise ValueError(
            f"model={config.name} has no bundled weights: it needs checkpoint=FOLDER, made by {written('convert')} of the "
            "published Wan2.2-S2V-14B (for live_avatar_14b also LiveAvatar); model=preview needs nothing"
        )
    checkpoint = Checkpoint.open(Path(config.weights))
    checkpoint.config(config)
    return checkpoint


def _mixed(voices: tuple[Speech, ...]) -> Speech:
    """The sum of all recordings, clipped to [-1,1], as long as the longest."""
    mixed = np.zeros(max(len(voice.samples) for voice in voices), np.float32)
    for voice in voices:
        mixed[: len(voice.samples)] += voice.samples
    return Speech(np.clip(mixed, -1, 1), voices[0].sample_rate)


def _masks(names: list[str], voices: int, shape: tuple[int, ...]) -> list[np.ndarray]:
    """The masks as uint8 [H,W,3]. Raises ValueError unless there is one for each voice, of the size of the portrait."""
    if len(names) != voices:
        raise ValueError(f"face.masks names {len(names)} pictures for {voices} recordings; give one for each of audio=a.wav+b.wav")
    masks = [load_image(name, "face.masks") for name in names]
    for name, mask in zip(names, masks, strict=True):
        if mask.shape != shape:
            sizes = f"{mask.shape[1]}x{mask.shape[0]} pixels, the portrait {shape[1]}x{shape[0]}"
            raise ValueError(f"face.masks={name} has {sizes}; draw it over the portrait")
    return masks


def _poses(motion: HeadConfig, inputs: Inputs) -> np.ndarray:
    """The frames of the pose video, uint8 [F,H,W,3] at the size and frame rate of the output, padded with black after its end."""
    height, width = inputs.portrait.pixels.shape[:2]
    found = [covering(frame, width, height) for frame in islice(frames_at(motion.pose, inputs.fps), inputs.num_frames)]
    if motion.motion_scale != 1:
        found = [_moved_further(pose, found[0], motion.motion_scale) for pose in found]
    return _lengthened(np.array(found, np.uint8).reshape(-1, height, width, 3), inputs.num_frames)


def _moved_further(pose: np.ndarray, first: np.ndarray, scale: float) -> np.ndarray:
    """A pose whose every part is `scale` times as far from where it is in the first one.  uint8 [H,W,3] -> uint8 [H,W,3]"""
    points = move_further(pose_motion(pose, first).unsqueeze(0), scale)
    points = F.interpolate(rearrange(points, "1 h w c -> 1 c h w"), pose.shape[:2], mode="bilinear", align_corners=False)
    drawn, grid = rearrange(torch.from_numpy(pose), "h w c -> 1 c h w").float(), rearrange(points, "1 c h w -> 1 h w c")
    moved = F.grid_sample(drawn, grid, padding_mode="border", align_corners=False)
    return rearrange(moved, "1 c h w -> h w c").round().to(torch.uint8).numpy()


def _published_length(config: InferConfig, speech: Speech) -> int:
    """Number of video frames that the published pipelines make for the recording.

    These are whole clips, sometimes one more than the sound needs, minus the three frames dropped from the first clip.
    """
    resampled = num_resampled(Wav2VecEncoder.num_states(len(speech.samples)))
    clips = published_clips(resampled, config.video.infer_frames, config.video.fps)
    return min(clips, config.video.num_clip or clips) * config.video.infer_frames - DROPPED_FRAMES


def _chunks(frames: Iterator[Tensor], frames_left: FramesLeft, stream: DeviceStream, *, timer: StageTimer) -> Iterator[Tensor]:
    """Convert frames [1,3,F,H,W] in [-1,1] made on a stream to bytes uint8 [F,H,W,3] in host memory, up to the end of the video."""
    start, to_pixels = 0, lambda some: rearrange(to_bytes(some[0]), "c f h w -> f h w c").contiguous()
    for some in frames:
        if count := frames_left(start, some.shape[2]):
            with timer.stage("decode", stream):
                (pixels,), copied = to_host([stream.run(to_pixels, some[:, :, :count])], stream)
                copied.synchronize()
            yield pixels
        start += some.shape[2]


def _lengthened(pose: np.ndarray, frames: int) -> np.ndarray:
    """The poses, padded with black frames to `frames`."""
    return np.concatenate([pose, np.zeros((max(0, frames - len(pose)), *pose.shape[1:]), np.uint8)])


def _audio_weights(inputs: Inputs, patch: int, scale: float) -> Tensor | None:
    """Weights of what the audio injectors add to each patch: motion.dynamic_scale, where a mask of the voice covers more than half of it,
    else 0; without masks everywhere.  -> [voices,1,rows,columns]; None = 1 everywhere
    """
    if inputs.masks is not None:
        coverage = F.avg_pool2d(torch.from_numpy(inputs.masks).float()[:, None], patch)
        return scale * (coverage > 0.5).float()
    height, width = inputs.portrait.pixels.shape[:2]
    return None if scale == 1 else torch.full((1, 1, height // patch, width // patch), scale)


@torch.no_grad()
def _encode(autoencoder: WanAutoencoder, segment: Segment) -> dict[str, Tensor]:
    """VAE latents of the frames. The past frame gives the first latent frame, which is dropped: all others have four video frames."""
    frames = to_signed(rearrange(segment.pixels, "f h w c -> 1 c f h w")).to(next(autoencoder.parameters()))
    latents, _ = autoencoder.encode(frames)
    ref, _ = autoencoder.encode(frames[:, :, 1 + segment.rest : 2 + segment.rest])
    return {"latents": latents[0, :, 1:].float().cpu(), "ref": ref[0].float().cpu()}
