"""The values that the stages of the program pass to each other, frozen and checked when created; and `pick`, for choices by name.

Shapes: H and W are rows and columns of latents or pixels, rows and columns alone those of patches.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from sonic.geometry import FPS
from sonic.geometry import BlockSpan as BlockSpan

T = TypeVar("T")


def pick(table: Mapping[str, T], name: str, option: str) -> T:
    """The entry of `table` called `name`. Raises ValueError with the choices, closest first, when there is none."""
    if name in table:
        return table[name]
    close = difflib.get_close_matches(str(name), table, n=len(table), cutoff=0.5)
    choices = close + sorted(set(table) - set(close))
    raise ValueError(f"{option}={name} is unknown; choose one of: {', '.join(choices)}")


@dataclass(frozen=True)
class Conditions:
    """The inputs of the model besides noisy latents and timestep.

    ref [B,C,1,H,W] latents of the portrait; text [B,L,text_dim]; audio [B,K,E,F] speech features of K hidden layers, of width E, one
    column per video frame; motion [B,C,Tm,H,W] past latents, None without motion tokens; pose [B,C,T,H,W], None for zeros.
    With several voices in one picture audio is [B·voices,K,E,F], and masks [B·voices,1,rows,columns] weight the patches of each voice.
    """

    ref: Tensor
    text: Tensor
    audio: Tensor | None = None
    motion: Tensor | None = None
    pose: Tensor | None = None
    masks: Tensor | None = None

    def __post_init__(self) -> None:
        _expect("ref", self.ref, "BCTHW")
        _expect("text", self.text, "BLD")
        _expect("audio", self.audio, "BKEF")
        _expect("motion", self.motion, "BCTHW")
        _expect("pose", self.pose, "BCTHW")
        if self.ref.shape[2] != 1:
            raise ValueError(f"ref has {self.ref.shape[2]} latent frames: a portrait is exactly one")
        _expect("masks", self.masks, "BTHW")
        voices = ("audio", "masks") if self.masks is not None else ()
        batches = {value.shape[0] for name, value in self._tensors() if name not in voices}
        if voices and (self.audio is None or self.audio.shape[0] != self.masks.shape[0]):
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
        pick({"audio": 0, "text": 0, "pose": 0, "motion": 0}, name, "condition")
        value = getattr(self, name)
        becomes_none = name == "motion" or value is None
        return replace(self, **{name: None if becomes_none else value.new_zeros(1).expand(value.shape)})

    def to(self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditions:
        """The conditions on another device or in another dtype."""
        return replace(self, **{name: value.to(device=device, dtype=dtype) for name, value in self._tensors()})

    def _tensors(self) -> list[tuple[str, Tensor]]:
        pairs = [(field.name, getattr(self, field.name)) for field in fields(self)]
        return [(name, value) for name, value in pairs if isinstance(value, Tensor)]


@dataclass(frozen=True)
class LatentBlock:
    """Clean latents [B,C,T,H,W] of one block."""

    latents: Tensor
    span: BlockSpan

    def __post_init__(self) -> None:
        _expect("latents", self.latents, "BCTHW")
        if self.latents.shape[2] != self.span.latent_frames:
            raise ValueError(f"{self.latents.shape[2]} latent frames do not fill {self.span}")


@dataclass(frozen=True)
class FrameChunk:
    """Finished video frames, uint8 [F,H,W,3]; `start` is the index of the first one."""

    pixels: Tensor | np.ndarray
    start: int

    def __post_init__(self) -> None:
        _expect_picture("pixels", self.pixels, ndim=4)
        if self.start < 0:
            raise ValueError(f"start={self.start}: frames count from 0")

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
    """A photograph, uint8 [H,W,3], with its face and mouth, which are None for models that generate the whole picture."""

    pixels: np.ndarray
    face: FaceBox | None = None
    mouth: Mouth | None = None

    def __post_init__(self) -> None:
        _expect_picture("pixels", self.pixels, ndim=3)


@dataclass(frozen=True)
class Crop:
    """The square of a photograph that the model works on, `resolution` pixels wide: centre, side and angle (radians) in the photograph."""

    center_x: float
    center_y: float
    side: float
    angle: float
    resolution: int

    def __post_init__(self) -> None:
        if self.side <= 0 or self.resolution < 1:
            raise ValueError(f"{self} is empty: side and resolution must be positive")


@dataclass(frozen=True)
class Speech:
    """A recording as float32 mono samples [samples] in [-1, 1]; `path` is the original file, which the muxer needs."""

    samples: np.ndarray
    sample_rate: int = 16_000
    path: Path | None = None

    def __post_init__(self) -> None:
        if self.samples.ndim != 1 or self.samples.dtype != np.float32:
            raise ValueError(f"speech must be float32 [n], not {self.samples.dtype} {list(self.samples.shape)}")
        if self.sample_rate <= 0:
            raise ValueError(f"sample_rate={self.sample_rate} Hz must be positive")

    @property
    def seconds(self) -> float:
        """Length of the recording in seconds."""
        return len(self.samples) / self.sample_rate


@dataclass(frozen=True)
class Inputs:
    """The inputs of one video: the portrait at the size of the video, the recording, the number of frames at `fps`, the seed, and the
    prompts for models that read text.

    With several speakers `speech` is their mix, `voices` the separate recordings, and `masks` [voices,H,W] the area of each speaker;
    `pose` uint8 [F,H,W,3] is a video of poses to follow. `location` is where face and mouth are in the photograph, as options.
    """

    portrait: Portrait
    speech: Speech
    num_frames: int
    seed: int = 0
    fps: int = FPS
    prompt: str = ""
    negative_prompt: str = ""
    voices: tuple[Speech, ...] = ()
    masks: np.ndarray | None = None
    pose: np.ndarray | None = None
    location: dict[str, tuple[float, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.voices) != (0 if self.masks is None else len(self.masks)):
            raise ValueError(f"{len(self.voices)} voices need as many masks")
        if self.num_frames < 1:
            raise ValueError(f"num_frames={self.num_frames}: a video has at least one frame")


def _expect(name: str, value: Tensor | None, axes: str) -> None:
    if value is not None and value.ndim != len(axes):
        raise ValueError(f"{name} has shape {list(value.shape)}, expected the axes [{','.join(axes)}]")


def _expect_picture(name: str, value: Tensor | np.ndarray, *, ndim: int) -> None:
    eight_bit = value.dtype in (torch.uint8, np.uint8)
    if value.ndim != ndim or value.shape[-1] != 3 or not eight_bit:
        axes = "[F,H,W,3]" if ndim == 4 else "[H,W,3]"
        raise ValueError(f"{name} must be uint8 {axes}, not {value.dtype} {list(value.shape)}")


@dataclass(frozen=True)
class MotionLayers:
    """The motion of a picture in each frame.

    flow [...,F,2,h,w] (x, y; source minus output position, in widths of the picture); interior [...,F,3,h,w], the inside of the mouth
    that is blended over the displaced picture with opacity [...,F,1,h,w], both in [0,1].
    """

    flow: Tensor
    opacity: Tensor
    interior: Tensor
