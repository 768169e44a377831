"""Draws faces of people who do not exist, in the canonical face crop, with exactly known position and shape of the mouth.

The model must learn to leave a photograph as it is, so skin, hair and background have photographic texture, and some pictures
are photographs with lips drawn on them.  Animation is in puppet.py.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sonic.geometry import MOUTH_ANCHOR, MOUTH_UNIT
from sonic.synthetic import puppet
from sonic.synthetic.face_parts import EVERYBODY, Painter, Traits, draw_brows_and_eyes, draw_hair, draw_head, draw_mouth, draw_nose
from sonic.types import MotionLayers

SKIN = np.array([(255, 224, 196), (240, 200, 165), (222, 172, 130), (190, 135, 95), (140, 92, 62), (95, 62, 45)]) / 255.0
HAIR = np.array([(30, 22, 18), (70, 45, 25), (120, 80, 40), (200, 165, 95), (150, 60, 30), (190, 190, 190)]) / 255.0
TEXTURES = (
    "coffee", "chelsea", "rocket", "gravel", "brick", "grass", "camera", "coins", "hubble_deep_field", "retina", "immunohistochemistry",
)  # fmt: skip


class Exposure(NamedTuple):
    """How a camera shows brightness: value ** gamma * level * balance, with the balance of red, green and blue."""

    gamma: float
    level: float
    balance: np.ndarray

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        """A picture [...,3] in [0,1] as the camera shows it, not yet clipped."""
        return np.clip(picture, 0, 1) ** self.gamma * self.level * self.balance


@dataclass(frozen=True)
class Identity:
    """A drawn person: `picture` uint8 [R,R,3] at rest, the shape of the mouth in it, and the exposure of the camera."""

    picture: np.ndarray
    mouth: puppet.MouthShape
    exposure: Exposure


def draw_identity(
    rng: np.random.Generator,
    resolution: int,
    *,
    split: str = "train",
    jitter: float = 1.0,
    photographs: float = 0.25,
    traits: Traits = EVERYBODY,
) -> Identity:
    """Draw a new person at rest.  Splits "train" and "test" share no people; `jitter` scales the error of the crop's alignment.

    A share `photographs` of the "people" is a photograph of anything with lips drawn on it, for training only.  The same random
    numbers with another gap in `traits` give the same person with another opening of the mouth.

    Raises ValueError for another split.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split={split} is unknown; choose one of: train, test")
    rng = np.random.default_rng([rng.integers(2**31), ("train", "test").index(split)])
    shape = _position_mouth(rng, resolution, jitter)
    asked = {name: getattr(traits, name) for name in ("gap", "curve") if getattr(traits, name) is not None}
    shape = replace(shape, **asked, chin=shape.chin + traits.jaw_drop)
    painter = Painter(rng, resolution, shape=shape, background=_photo(rng, resolution), traits=traits)
    picture = _photograph_background(painter) if rng.random() < photographs else _drawn_person(painter)
    picture, exposure = _camera(rng, picture)
    return Identity((picture * 255).round().astype(np.uint8), painter.shape, exposure)


def animate(identity: Identity, visemes: Tensor, pose: Tensor | None = None) -> tuple[Tensor, MotionLayers]:
    """Animate a person.  visemes [F,5], pose [F,4] or None -> frames [F,3,R,R] in [-1,1] and the motion that made them."""
    picture = torch.from_numpy(identity.picture).permute(2, 0, 1).float() / 255
    motion = puppet.move(identity.mouth, visemes, pose, resolution=picture.shape[-1])
    return puppet.apply(picture, motion).clamp(0, 1) * 2 - 1, motion


def head_motion(rng: np.random.Generator, frames: int, scale: float = 1.0) -> Tensor:
    """Random smooth head motion with occasional blinks, at 25 fps.  -> [F,4] roll, shift x, shift y, blink (1 = closed)

    All go `scale` times as far, but lids no further than closed.
    """
    seconds = np.arange(frames) / 25
    track = np.zeros((frames, 4), np.float32)
    for column, amplitude in enumerate((0.045, 0.02, 0.014)):
        for _ in range(3):
            track[:, column] += amplitude / 2 * rng.uniform(0.2, 1) * np.sin(2 * np.pi * (rng.uniform(0.08, 0.5) * seconds + rng.random()))
    start = int(rng.integers(5, 80))
    while start < frames - 5:
        track[start : start + 5, 3] = (0.4, 1.0, 1.0, 0.6, 0.25)
        start += int(rng.integers(50, 130))
    track *= scale
    track[:, 3] = track[:, 3].clip(max=1)
    return torch.from_numpy(track)


def _position_mouth(rng: np.random.Generator, resolution: int, jitter: float) -> puppet.MouthShape:
    """The canonical mouth position plus the typical error of face detection."""
    near = lambda sigma: float(np.clip(rng.normal(0, sigma), -2.2 * sigma, 2.2 * sigma)) * jitter  # noqa: E731
    unit = MOUTH_UNIT * resolution * float(np.exp(near(0.09)))
    x, y = (anchor * resolution + near(0.016) * resolution for anchor in MOUTH_ANCHOR)
    gap = 0.0 if rng.random() < 0.5 else float(rng.uniform(0.06, 0.5))
    curve = float(rng.uniform(-0.06, 0.08) + (gap > 0) * rng.uniform(0, 0.22) + (rng.random() < 0.2) * rng.uniform(0, 0.15))
    enamel, throat, tongue = np.array([0.92, 0.89, 0.82]), np.array([0.23, 0.07, 0.07]), np.array([0.70, 0.32, 0.33])
    inside = {
        "teeth": tuple((enamel * rng.uniform(0.75, 1.02)).tolist()),
        "throat": tuple((throat * rng.uniform(0.6, 1.4)).tolist()),
        "tongue": tuple((tongue * rng.uniform(0.8, 1.1)).tolist()),
        "teeth_height": (float(rng.uniform(0.16, 0.26)),),
    }
    return puppet.MouthShape(
        x=x, y=y, unit=unit, roll=near(0.05), curve=curve, gap=gap,
        chin=float(rng.uniform(1.5, 2.15)), gain=float(rng.uniform(0.92, 1.08)), inside=inside,
    )  # fmt: skip


def _drawn_person(painter: Painter) -> np.ndarray:
    rng = painter.rng
    tone = np.clip(SKIN[rng.integers(len(SKIN))] * rng.uniform(0.85, 1.08) * rng.normal(1, 0.04, 3), 0.05, 1)
    hair = np.clip(HAIR[rng.integers(len(HAIR))] * rng.uniform(0.7, 1.15), 0.02, 1)
    if rng.random() < 0.35:
        painter.soften_background()
    draw_head(painter, tone, hair)
    draw_nose(painter)
    draw_brows_and_eyes(painter, hair)
    draw_mouth(painter, tone)
    draw_hair(painter, hair)
    return painter.canvas


def _photograph_background(painter: Painter) -> np.ndarray:
    """A photograph of anything, on which lips are drawn: the model must learn to warp any content."""
    rng = painter.rng
    if rng.random() < 0.5:
        painter.soften_background()
    tone = np.clip(painter.canvas.mean((0, 1)) * rng.uniform(0.7, 1.3), 0.08, 0.95)
    draw_mouth(painter, tone, strength=float(rng.uniform(0.5, 0.95)))
    return painter.canvas


@lru_cache
def _library() -> tuple[np.ndarray, ...]:
    """The photographs bundled with scikit-image, as float32 RGB in [0,1]."""
    from skimage import color, data, img_as_float32

    pictures = [img_as_float32(getattr(data, name)()) for name in TEXTURES]
    return tuple(color.gray2rgb(p) if p.ndim == 2 else np.ascontiguousarray(p[..., :3]) for p in pictures)


def _photo(rng: np.random.Generator, resolution: int) -> np.ndarray:
    """A random square of a random photograph.  -> float32 [R,R,3] in [0,1]"""
    source = _library()[rng.integers(len(_library()))]
    side = int(min(source.shape[:2]) * rng.uniform(0.3, 1.0))
    top, left = (int(rng.integers(0, n - side + 1)) for n in source.shape[:2])
    patch = torch.from_numpy(source[top : top + side, left : left + side]).permute(2, 0, 1).unsqueeze(0)
    patch = torch.nn.functional.interpolate(patch, (resolution, resolution), mode="bilinear", antialias=True, align_corners=False)
    picture = patch[0].permute(1, 2, 0).numpy().copy()
    return picture[:, ::-1].copy() if rng.random() < 0.5 else picture


def _camera(rng: np.random.Generator, picture: np.ndarray) -> tuple[np.ndarray, Exposure]:
    """Apply the exposure, white balance, blur and grain of a random camera; also returns the exposure."""
    from scipy.ndimage import gaussian_filter

    exposure = Exposure(rng.uniform(0.75, 1.3), rng.uniform(0.8, 1.1), rng.normal(1, 0.03, 3))
    picture = exposure(picture)
    if rng.random() < 0.6:
        blur = rng.uniform(0.3, 1.5) * picture.shape[0] / 192
        picture = gaussian_filter(picture, (blur, blur, 0))
    return np.clip(picture + rng.normal(0, rng.uniform(0, 0.015), picture.shape), 0, 1), exposure
