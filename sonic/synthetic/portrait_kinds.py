"""Drawn portraits by kind: closed, smiling and open mouths, beards, moustaches, glasses and turned heads, each with its closed twin.

The twin is the same person with lips that meet, which is what an animation of the portrait must look like in silence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from sonic.geometry import smoothstep
from sonic.synthetic.draw_face import Identity, draw_identity
from sonic.synthetic.face_parts import Traits
from sonic.synthetic.puppet import MouthShape, warped
from sonic.types import pick

YAW = (10, 25)  # degrees that a head of the kind "profile" is turned, to either side
DEPTH, SIDES = 2.3, 3.0  # of the head in mouth units: from the sides, this far from the middle, to the mouth
NOSE = (0.55, 0.55, 0.7)  # how far it stands out of the face, and its half width and half height
AXIS = 1.4  # depth of the vertical line about which the head turns


def _any_gap(rng: np.random.Generator) -> float:
    return 0.0 if rng.random() < 0.5 else float(rng.uniform(0.06, 0.5))


KINDS: dict[str, Callable[[np.random.Generator], Traits]] = {
    "closed": lambda rng: Traits(gap=0.0),
    "smile": lambda rng: Traits(gap=float(rng.uniform(0.08, 0.35)), curve=float(rng.uniform(0.08, 0.35))),
    "open": lambda rng: Traits(gap=float(rng.uniform(0.4, 1.1)), jaw=True),
    "beard": lambda rng: Traits(gap=_any_gap(rng), beard=1),
    "moustache": lambda rng: Traits(gap=_any_gap(rng), moustache=1),
    "glasses": lambda rng: Traits(gap=_any_gap(rng), glasses=1),
    "profile": lambda rng: Traits(gap=_any_gap(rng)),
}


@dataclass(frozen=True)
class DrawnPortrait:
    """A person as in the portrait, and the same person with closed lips, both as seen from the front; and how far the portrait's head is
    turned, in degrees (> 0: to the right of the picture)."""

    person: Identity
    closed: Identity
    yaw: float = 0.0

    @property
    def picture(self) -> np.ndarray:
        """The portrait, uint8 [R,R,3]."""
        if not self.yaw:
            return self.person.picture
        front = rearrange(torch.from_numpy(self.person.picture), "h w c -> 1 c h w").float()
        return rearrange(turned(front, self.person.mouth, self.yaw), "1 c h w -> h w c").round().byte().numpy()


def draw_portrait(rng: np.random.Generator, resolution: int, kind: str, *, split: str = "train", jitter: float = 1.0) -> DrawnPortrait:
    """Draw a new person of a kind."""
    traits = pick(KINDS, kind, "kind")(rng)
    yaw = float(rng.uniform(*YAW) * rng.choice((-1, 1))) if kind == "profile" else 0.0
    seed, options = int(rng.integers(2**31)), {"split": split, "jitter": jitter, "photographs": 0}
    person, closed = (
        draw_identity(np.random.default_rng(seed), resolution, traits=each, **options) for each in (traits, replace(traits, gap=0.0))
    )
    return DrawnPortrait(person, closed, yaw)


def turned(frames: Tensor, mouth: MouthShape, yaw: float) -> Tensor:
    """Frames of a head seen from the front, as of one that is turned by `yaw` degrees.  [F,C,R,R] -> [F,C,R,R]"""
    if not yaw:
        return frames
    columns, moved = _columns(mouth, yaw, frames.shape[-1])
    return _sampled(frames, torch.from_numpy(np.stack([np.interp(columns, row, columns) for row in moved])).float())


def turned_back(frames: Tensor, mouth: MouthShape, yaw: float) -> Tensor:
    """Frames of a head that is turned by `yaw` degrees, as seen from the front; the inverse of `turned`.  [F,C,R,R] -> [F,C,R,R]"""
    return _sampled(frames, torch.from_numpy(_columns(mouth, yaw, frames.shape[-1])[1]).float()) if yaw else frames


def _columns(mouth: MouthShape, yaw: float, resolution: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns of the pixels' middles [R], and where these pixels are when the head is turned [R,R]: each row increases.

    The surface of the head is a parabolic cylinder with a nose, seen from afar; neck and border of the picture stay.
    """
    centres = torch.arange(resolution) + 0.5
    y, x = torch.meshgrid((centres - mouth.y) / mouth.unit, (centres - mouth.x) / mouth.unit, indexing="ij")
    height, half_width, half_height = NOSE
    nose = height * torch.exp(-((x / half_width) ** 2) - ((y + 1) / half_height) ** 2)
    depth = DEPTH * (1 - (x / SIDES) ** 2).clamp(min=0) + nose - AXIS
    angle = math.radians(yaw)
    shift = x * (math.cos(angle) - 1) + depth * math.sin(angle)
    inner = smoothstep(torch.minimum(centres, resolution - centres) / (0.16 * resolution))
    head = 1 - smoothstep((y - mouth.chin) / 1.5)
    return centres.numpy(), (centres + shift * inner * head * mouth.unit).numpy()


def _sampled(frames: Tensor, columns: Tensor) -> Tensor:
    """Frames whose pixels come from these columns of the same row.  frames [F,C,R,R], columns [R,R]"""
    resolution = frames.shape[-1]
    across = (columns - (torch.arange(resolution) + 0.5)) / resolution
    flow = torch.stack([across, torch.zeros_like(across)])[None]
    return torch.cat([warped(frame, flow) for frame in frames])
