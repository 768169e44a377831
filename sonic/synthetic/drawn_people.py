"""Endless data set of short clips of drawn people with exactly known motion, for training the autoencoder."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sonic.data.pixels import to_signed
from sonic.geometry import FRAMES_PER_LATENT, smoothstep
from sonic.synthetic import draw_face, puppet


def random_visemes(rng: np.random.Generator, frames: int) -> Tensor:
    """Smooth random visemes: interpolates between random mouth shapes, some of them at rest.  -> [F,5]"""
    keys = int(rng.integers(2, max(3, frames + 1)))  # up to one new shape per frame: lips close within 70 ms
    targets = np.zeros((keys, 5), np.float32)
    for row in targets:
        kind = rng.random()
        if kind < 0.7:
            row[:] = (rng.beta(1.2, 1.6), rng.uniform(-0.9, 0.7), 0, rng.random(), rng.random())
        elif kind < 0.85:
            row[2] = rng.uniform(0.5, 1)
            row[1] = rng.uniform(-0.3, 0.3)
    at = np.linspace(0, keys - 1, frames) + rng.uniform(-0.4, 0.4)
    at = np.clip(at, 0, keys - 1)
    left = np.minimum(at.astype(int), keys - 2)
    share = smoothstep((at - left)[:, None])
    return torch.from_numpy((targets[left] * (1 - share) + targets[left + 1] * share).astype(np.float32))


def mouth_focus(shape: puppet.MouthShape, resolution: int, scale: int) -> Tensor:
    """Loss weight of the mouth region: 1 at the lips, falling to 0 beyond the chin.  -> [R/scale,R/scale]"""
    centres = (torch.arange(resolution // scale) + 0.5) * scale
    y, x = torch.meshgrid((centres - shape.y) / shape.unit, (centres - shape.x) / shape.unit, indexing="ij")
    return torch.exp(-((x / 1.7) ** 4) - ((y - 0.4) / 1.5) ** 4)


def drawn_clip(rng: np.random.Generator, resolution: int, *, frames: int = 8, split: str = "train") -> dict[str, Tensor]:
    """A few frames of one drawn person.

    picture [3,R,R] in [-1,1]; visemes [F,5], head [F,4] and the motion they cause at R/2 (see motion_targets); shown [F,3,R/2,R/2], the
    mouth's inside as the camera sees it; focus [R/2,R/2].
    """
    identity = draw_face.draw_identity(rng, resolution, split=split)
    pose = None
    if rng.random() < 0.35:
        start = int(rng.integers(0, 80))
        pose = draw_face.head_motion(rng, start + frames, float(rng.uniform(0.5, 1.5)))[start:]
    visemes = random_visemes(rng, frames)
    motion = motion_targets(identity.mouth, visemes, pose, resolution=resolution)
    inside = puppet.move(identity.mouth.scaled(0.5), visemes, pose, resolution=resolution // 2, paint=puppet.lit).interior
    shown = torch.from_numpy(identity.exposure(inside.movedim(1, -1).numpy())).movedim(-1, 1).clamp(0, 1).float()
    labels = {"visemes": visemes, "head": torch.zeros(frames, 4) if pose is None else pose}
    picture = to_signed(torch.from_numpy(identity.picture).permute(2, 0, 1))
    return {"picture": picture, "focus": mouth_focus(identity.mouth, resolution, 2), "shown": shown, **labels, **motion}


def motion_targets(shape: puppet.MouthShape, visemes: Tensor, pose: Tensor | None, *, resolution: int) -> dict[str, Tensor]:
    """Motion targets at half the picture's resolution.  -> flow [F,2,h,w], opacity [F,1,h,w], interior [F,3,h,w]

    Undefined values are zero: flow where the interior of the mouth covers the picture, colour where it does not show. The interior is the
    sketch that latents describe, which the decoder learns to show in the light of the portrait.
    """
    motion = puppet.move(shape.scaled(0.5), visemes, pose, resolution=resolution // 2)
    return {
        "flow": motion.flow * ((1 - motion.opacity) / 1e-3).clamp(max=1),
        "opacity": motion.opacity,
        "interior": motion.interior * (motion.opacity / 1e-3).clamp(max=1),
    }


class DrawnFaces(Dataset):
    """Endless drawn people. The key of an item is (index, seed) and the item depends on the seed alone, so that a run resumes exactly."""

    def __init__(self, *, window: int = 2, resolution: int = 192, split: str = "train") -> None:
        self.frames, self.resolution, self.split = FRAMES_PER_LATENT * (window or 2), resolution, split

    def __len__(self) -> int:
        return 2**20

    def __getitem__(self, draw: tuple[int, int]) -> dict[str, Tensor]:
        return drawn_clip(np.random.default_rng(draw[1]), self.resolution, frames=self.frames, split=self.split)
