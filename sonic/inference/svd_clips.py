"""Clips of one's own videos for the training of Sonic's UNet: every other frame as latents, a reference picture, the sound and the motion.

Tensors of a clip of T frames at 12.5 a second, 2·latent_frames of them, float16 (h, w = data.size / 8):
    latents [4,T,h,w]          the VAE's posterior means, multiplied by its scaling factor
    image_latents [4,h,w]      of the reference, which is the frame of the clip whose mouth is most closed; not multiplied
    image_embed [D]            CLIP's embedding of the reference
    face_mask [8h,8w]          the face of the reference, 1 inside and 0 outside
    token_ticks [T,10,K,E]     Whisper's states from 80 ms before the beginning of each frame to 120 ms after it
    bucket_ticks [T,50,E]      the last of the states, from 480 ms before to 520 ms after
    buckets [T,2]              see `motion_buckets`
"""

from __future__ import annotations

import logging
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from sonic.checkpoint.sonic_checkpoint import SonicCheckpoint
from sonic.config import parse_size
from sonic.data.data_config import PrecomputeConfig
from sonic.data.face_motion import motion_buckets
from sonic.data.faces import Face
from sonic.data.pixels import to_signed
from sonic.data.segments import Segment, covering_frames
from sonic.data.shards import Encoders
from sonic.encoders.clip_image import ClipImageEncoder
from sonic.encoders.clip_sound import BUCKET_TICKS, TOKEN_TICKS, tick_windows
from sonic.geometry import FPS, FRAMES_PER_LATENT, WAN_MULTIPLE
from sonic.inference.components import find_device
from sonic.inference.svd_picture import SvdPicture
from sonic.types import FaceBox
from sonic.vae.svd_vae import SvdAutoencoder

log = logging.getLogger("sonic.data")
EVERY = 2  # video frames per frame of a clip
TICKS = 2  # of Whisper in a video frame
BATCH = 8  # frames that the VAE encodes together
SHORT = 384  # px: the smallest short side that the model is published for


def svd_clip_encoders(checkpoint: SonicCheckpoint, config: PrecomputeConfig) -> Encoders:
    """The encoders of a checkpoint, on the machine's accelerator if it has one.

    Raises ValueError without videos, and for clips that the model cannot be trained with.
    """
    name, window = config.model.name, checkpoint.config(config.model).unet.window_frames
    if not config.data.source:
        raise ValueError(f"model={name} learns from videos: name a folder of them as data.source=FOLDER")
    size = parse_size(config.data.size, "data.size")
    if any(side % WAN_MULTIPLE for side in size):
        raise ValueError(f"data.size={config.data.size}: both sides must be multiples of {WAN_MULTIPLE} for model={name}; use 512x512")
    per_latent = FRAMES_PER_LATENT // EVERY
    if (frames := per_latent * config.latent_frames) < window:
        least = -(-window // per_latent)
        raise ValueError(
            f"latent_frames={config.latent_frames} gives clips of {frames} frames at {FPS / EVERY:g} a second: "
            f"model={name} denoises windows of {window}; use latent_frames={least} or more"
        )
    if min(size) < SHORT:
        log.warning("data.size=%s: model=%s is published for short sides from %d; use 512x512", config.data.size, name, SHORT)
    device = find_device("auto")
    autoencoder, sound = checkpoint.autoencoder(device, torch.float32), checkpoint.speech(device)
    return Encoders(
        encode_audio=lambda samples, frames: sound.states(samples).cpu(),
        autoencoder=autoencoder,
        hashes=svd_encoder_hashes(checkpoint),
        fps=FPS,
        frame=covering_frames,
        encode=partial(_encode, autoencoder, checkpoint.image_encoder(device, torch.float32)),
        audio_of=states_around,
    )


def svd_encoder_hashes(checkpoint: SonicCheckpoint) -> dict[str, str]:
    """Hashes of the files that the VAE was converted from, and of those of Whisper and CLIP together."""
    seen = checkpoint.hash_of("image_encoder") + checkpoint.hash_of("whisper")
    return {"autoencoder_hash": checkpoint.hash_of("vae"), "speech_hash": seen}


def states_around(states: Tensor, segment: Segment) -> dict[str, Tensor]:
    """The states around the beginning of every other frame of a segment, zeros where there is no sound.  [ticks,K,E] of the video"""
    missing = TICKS * (segment.first + segment.frames) - len(states)
    states = F.pad(states, (0, 0, 0, 0, 0, max(0, missing)))
    shown = slice(segment.first, segment.first + segment.frames, EVERY)
    last = tick_windows(states[:, -1], BUCKET_TICKS, step=TICKS)[shown]
    return {"token_ticks": tick_windows(states, TOKEN_TICKS, step=TICKS)[shown], "bucket_ticks": last}


@torch.no_grad()
def _encode(autoencoder: SvdAutoencoder, image_encoder: ClipImageEncoder, segment: Segment) -> dict[str, Tensor]:
    """All tensors of the clip of a segment but those of its sound."""
    device = next(autoencoder.parameters()).device
    shown = rearrange(segment.pixels[1::EVERY], "f h w c -> f c h w")
    latents = torch.cat([autoencoder.encode(to_signed(frames).to(device)) for frames in shown.split(BATCH)])
    reference = segment.pixels[1 + segment.rest].numpy()
    picture = SvdPicture.of(reference, _fitted_face(segment, segment.rest), reference.shape[1::-1])
    return {
        "latents": rearrange(latents * autoencoder.scaling_factor, "f c h w -> c f h w").cpu(),
        "image_latents": autoencoder.encode(picture.ref[None].to(device))[0].cpu(),
        "image_embed": image_encoder(picture.clip_pixels[None].to(device))[0].cpu(),
        "face_mask": picture.face_mask[0],
        "buckets": torch.from_numpy(motion_buckets(segment.landmarks)[::EVERY]).float(),
    }


def _fitted_face(segment: Segment, frame: int) -> FaceBox:
    """The face box of a frame of a segment in the pixels that `covering_frames` makes of it."""
    (wide, high), (height, width) = segment.size, segment.pixels.shape[1:3]
    box, scale = Face(segment.landmarks[frame], 1.0).box, max(width / wide, height / high)
    x, y = scale * box.x - (scale * wide - width) / 2, scale * box.y - (scale * high - height) / 2
    return FaceBox(x, y, scale * box.width, scale * box.height)
