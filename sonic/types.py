"""The values that the stages of the program pass to each other, frozen; `pick`, for choices by name; `upload`, of tensors to a device.

Shapes: H and W are rows and columns of latents or pixels, rows and columns alone those of patches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from sonic.config import one_of
from sonic.geometry import FPS, BlockSpan

T = TypeVar("T")
AXES = {"ref": "BCTHW", "text": "BLD", "audio": "BKEF", "motion": "BCTHW", "pose": "BCTHW", "masks": "BTHW"}  # of conditions


def pick(table: Mapping[str, T], name: str, option: str) -> T:
    """The entry of `table` called `name`. Raises ValueError with the choices, closest first, when there is none."""
    one_of(name, list(table), option)
    return table[name]


def upload(tensor: Tensor, device: torch.device | str | None) -> Tensor:
    """The tensor on a device. A copy from the host to a GPU goes through pinned memory: the host waits for copies from other memory, and
    for all work queued before them."""
    if device is None or tensor.device.type != "cpu" or torch.device(device).type != "cuda":
        return tensor.to(device=device)
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor).to(device, non_blocking=True)


@dataclass(frozen=True)
class Conditions:
    """The inputs of the model besides noisy latents and timestep.

    ref [B,C,1,H,W] latents of the portrait; text [B,L,text_dim]; audio [B,K,E,F] speech features of K hidden layers, of width E, one
    column per video frame; motion [B,C,Tm,H,W] past latents, None without motion tokens; pose [B,C,T,H,W], None for zeros.
    masks [B·voices,1,rows,columns] weight what the audio adds to each patch; with several voices in one picture audio is [B·voices,K,E,F].
    """

    ref: Tensor
    text: Tensor
    audio: Tensor | None = None
    motion: Tensor | None = None
    pose: Tensor | None = None
    masks: Tensor | None = None

    def __post_init__(self) -> None:
        for name, value in self._tensors():
            if value.ndim != len(AXES[name]):
                raise ValueError(f"{name} has shape {list(value.shape)}, expected the axes [{','.join(AXES[name])}]")
        if self.ref.shape[2] != 1:
            raise ValueError(f"ref has {self.ref.shape[2]} latent frames: a portrait is exactly one")
        voices = ("audio", "masks") if self.masks is not None else ()
        batches = {value.shape[0] for name, value in self._tensors() if name not in voices}
        if voices and self.audio is not None and self.audio.shape[0] != self.masks.shape[0]:
            raise ValueError(f"{self.masks.shape[0]} masks need as many voices")
        if len(batches) != 1:
            raise ValueError(f"conditions of different batch sizes {sorted(batches)} cannot go together")

    def at(self, span: BlockSpan) -> Conditions:
        """The part of audio and pose that belongs to one block; ref, text and motion stay whole."""
        first, last = span.first_frame, span.first_frame + span.frames
        return replace(
            self,
            audio=None if self.audio is None else self.audio[..., first:last],
            pose=None if self.pose is None else self.pose[:, :, span.start : span.stop],
        )

    def drop(self, name: str) -> Conditions:
        """The conditions without one of them: audio, text or pose become zeros, motion becomes None."""
        one_of(name, ("audio", "text", "pose", "motion"), "condition")
        value = getattr(self, name)
        becomes_none = name == "motion" or value is None
        return replace(self, **{name: None if becomes_none else value.new_zeros(1).expand(value.shape)})

    def to(self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditions:
        """The conditions on another device or in another dtype."""
        return replace(self, **{name: upload(value, device).to(dtype=dtype) for name, value in self._tensors()})

    def _tensors(self) -> list[tuple[str, Tensor]]:
        pairs = [(field.name, getattr(self, field.name)) for field in fields(self)]
        return [(name, value) for name, value in pairs if isinstance(value, Tensor)]


@dataclass(frozen=True)
class LatentBlock:
    """Clean latents [B,C,T,H,W] of one block."""

    latents: Tensor
    span: BlockSpan


@dataclass(frozen=True)
class FrameChunk:
    """Finished video frames, uint8 [F,H,W,3]; `start` is the index of the first one, which shows the sound at second start / fps.

    A player of the chunk plays the sound `sound_later_s` seconds later than that (negative = earlier).
    """

    pixels: Tensor | np.ndarray
    start: int
    sound_later_s: float = 0.0

    def __len__(self) -> int:
        return self.pixels.shape[0]


@dataclass(frozen=True)
class FaceBox:
    """A face in photo pixels: top left corner and size."""

    x: float
    y: float
    width: float
    height: float

    def __post_init__(self) -> None:
        numbers = (self.x, self.y, self.width, self.height)
        if not all(math.isfinite(number) for number in numbers) or self.width <= 0 or self.height <= 0:
            raise ValueError(f"face box {list(numbers)} is not a rectangle; give [x, y, width, height] in photo pixels")

    @property
    def middle(self) -> tuple[float, float]:
        """Its middle (x, y)."""
        return self.x + self.width / 2, self.y + self.height / 2


@dataclass(frozen=True)
class Mouth:
    """A mouth in photo pixels: centre, half its width, and the roll of the face in radians (+ = right corner lower)."""

    x: float
    y: float
    half_width: float
    angle: float = 0.0

    def __post_init__(self) -> None:
        numbers = (self.x, self.y, self.half_width, self.angle)
        if not all(math.isfinite(number) for number in numbers) or self.half_width <= 0:
            raise ValueError(f"mouth {list(numbers)} is impossible; give [x, y, half_width, angle] in photo pixels and radians")


@dataclass(frozen=True)
class Portrait:
    """A photograph, uint8 [H,W,3], with its face and mouth, which are None for models that generate the whole picture.

    lips [4,11,2]: inner edges of the upper and the lower lip, then the outer ones, in photo pixels from the left corner of the mouth to
    the right one; None where no landmarks were read. inside uint8 [H,W,4]: what the photograph showed between the lips before its mouth
    was closed, with the opacity in 0..255 with which that is seen in an open mouth; None where nothing was closed.
    eyes [2,16,2]: outlines of the lids in photo pixels, from corner to corner below and back above; None where no landmarks are known.
    head_offset: px from the mouth to the middle of the head along the line of the mouth; a head that is turned aside has some.
    """

    pixels: np.ndarray
    face: FaceBox | None = None
    mouth: Mouth | None = None
    lips: np.ndarray | None = None
    inside: np.ndarray | None = None
    eyes: np.ndarray | None = None
    head_offset: float = 0.0


@dataclass(frozen=True)
class Crop:
    """The square of a photograph that the model works on, `resolution` pixels wide: centre, side and angle (radians) in the photograph."""

    center_x: float
    center_y: float
    side: float
    angle: float
    resolution: int


@dataclass(frozen=True)
class Speech:
    """A recording as float32 mono samples [samples] in [-1, 1]; `path` is the original file, which the muxer needs.

    The sound track of a video plays it `later_s` seconds later than the pictures (negative = earlier).
    """

    samples: np.ndarray
    sample_rate: int = 16_000
    path: Path | None = None
    later_s: float = 0.0

    @property
    def seconds(self) -> float:
        """Length of the recording in seconds."""
        return len(self.samples) / self.sample_rate

    def lasting(self, seconds: float) -> Speech:
        """The recording cut to that length, or with silence at its end."""
        count = round(seconds * self.sample_rate)
        return replace(self, samples=np.pad(self.samples[:count], (0, max(0, count - len(self.samples)))))


@dataclass(frozen=True)
class Inputs:
    """The inputs of one video: the portrait at the size of the video, the recording, the number of frames at `fps`, the seed, and the
    prompts for models that read text.

    With several speakers `speech` is their mix, `voices` the separate recordings, and `masks` [voices,H,W] the area of each speaker;
    `pose` uint8 [F,H,W,3] is a video of poses to follow. `location` is where face, mouth and face crop are in the photograph.
    """

    portrait: Portrait
    speech: Speech
    num_frames: int
    seed: int = 0
    fps: float = FPS
    prompt: str = ""
    negative_prompt: str = ""
    voices: tuple[Speech, ...] = ()
    masks: np.ndarray | None = None
    pose: np.ndarray | None = None
    location: dict[str, Any] = field(default_factory=dict)

    def frames_left(self, start: int, count: int) -> int:
        """How many of the `count` frames from `start` belong to the video."""
        return max(0, min(count, self.num_frames - start))


class MotionLayers(NamedTuple):
    """The motion of a picture in each frame.

    flow [...,F,2,h,w] (x, y; source minus output position, in widths of the picture); interior [...,F,3,h,w], the inside of the mouth
    that is blended over the displaced picture with opacity [...,F,1,h,w], both in [0,1].
    """

    flow: Tensor
    opacity: Tensor
    interior: Tensor
