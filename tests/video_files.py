"""A folder of small MP4s: a good one, and one for every fault that a video may have."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from skimage import data
from torch import Tensor
from torch.nn import functional as F

from sonic.data.video import VideoWriter, timed_frames
from sonic.synthetic import draw_face, puppet, voices
from sonic.types import MotionLayers, Speech
from sonic.vae.warp import unit_grid

FPS = 25
MOUTH = puppet.MouthShape(
    x=134, y=145, unit=20, roll=0.05, gap=0.3, curve=0.1,
    inside={"teeth": (0.9, 0.87, 0.8), "throat": (0.2, 0.07, 0.07), "tongue": (0.7, 0.3, 0.3), "teeth_height": (0.2,)},
)  # fmt: skip


def astronaut() -> np.ndarray:
    """Head and shoulders, uint8 [260,260,3]; the mouth is MOUTH."""
    return np.ascontiguousarray(data.astronaut()[:260, 90:350])


def warp_crop(picture: Tensor, layers: MotionLayers) -> Tensor:
    """Apply motion to a crop without a photograph around it.  [B,3,R,R] in [-1,1] -> frames [B,3,F,R,R] in [-1,1]"""
    batch, frames = layers.flow.shape[:2]
    size = picture.shape[-2:]
    stacked = rearrange(torch.cat([layers.flow, layers.opacity, layers.interior], 2), "b f c h w -> (b f) c h w")
    full = F.interpolate(stacked, size, mode="bilinear", align_corners=False)
    flow, opacity, interior = full.split([2, 1, 3], dim=1)
    grid = unit_grid(*size, picture) + 2 * rearrange(flow, "n c h w -> n h w c")
    moved = F.grid_sample(picture.repeat_interleave(frames, 0), grid, padding_mode="border", align_corners=False)
    composed = torch.lerp(moved, interior.clamp(0, 1) * 2 - 1, opacity.clamp(0, 1))
    return rearrange(composed, "(b f) c h w -> b c f h w", b=batch)


def speech(seed: int, frames: int) -> tuple[np.ndarray, torch.Tensor]:
    """Synthesised speech at 16 kHz and its visemes [F,5]."""
    utterance = voices.say(np.random.default_rng(seed), split="test", seconds=frames / FPS)
    return utterance.samples.astype(np.float32), torch.from_numpy(voices.viseme_track(utterance, frames))


def talking(visemes: torch.Tensor, *, picture: np.ndarray | None = None, mouth: puppet.MouthShape = MOUTH, seed: int = 0) -> np.ndarray:
    """Frames of a face that speaks these visemes and moves a little, uint8 [F,H,W,3]."""
    still = rearrange(torch.from_numpy(astronaut() if picture is None else picture), "h w c -> c h w").float() / 255
    pose = draw_face.head_motion(np.random.default_rng(seed), len(visemes), 0.5)
    moved = puppet.apply(still, puppet.move(mouth, visemes, pose, resolution=still.shape[-1]))
    return rearrange((moved.clamp(0, 1) * 255).round().byte(), "f c h w -> f h w c").numpy()


def write(path: Path, pixels: np.ndarray, samples: np.ndarray | None, *, fps: int = FPS) -> Path:
    """Write frames and samples to an MP4."""
    speech_track = None if samples is None else Speech(samples)
    with VideoWriter(path, *pixels.shape[2:0:-1], num_frames=len(pixels), speech=speech_track, fps=fps) as writer:
        writer.write(pixels)
    return path


def delayed(samples: np.ndarray, seconds: float) -> np.ndarray:
    """The samples delayed, with the same length."""
    late = round(16_000 * seconds)
    return np.concatenate([np.zeros(late, np.float32), samples[:-late]])


def read_frames(path: Path) -> Iterator[np.ndarray]:
    """The frames of a video, uint8 [H,W,3]."""
    return (picture for _, picture in timed_frames(path))
