"""The interface of speech encoders: sound at 16 kHz becomes features [K,E,F] of K hidden layers of width E, one column per video frame."""

from __future__ import annotations

import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from sonic.config import ModelConfig
from sonic.geometry import FPS

IN_MEMORY = 1 << 30  # bytes; larger features are stored on disk


class SpeechEncoder(nn.Module, ABC):
    """Computes features of whole recordings, and of blocks of video frames while the sound is still arriving."""

    rate: ClassVar[int]  # feature vectors that are computed per second; the video may have another frame rate
    context_s: ClassVar[float]  # seconds of sound before a block that its features depend on while the sound is still arriving
    look_ahead_s: ClassVar[float]  # and after it
    num_layers: int  # K
    width: int  # E

    def encode_audio(self, samples: np.ndarray, num_frames: int, fps: int = FPS) -> Tensor:
        """Features of every video frame of a recording, in host memory.  float32 [samples] at 16 kHz -> [K,E,F]"""
        return self.encode_audio_batch([samples], num_frames, fps)[0]

    @torch.no_grad()
    def encode_audio_batch(self, voices: Sequence[np.ndarray], num_frames: int, fps: int = FPS) -> Tensor:
        """Features of several recordings.  -> [voices,K,E,F]"""
        features = _zeros((len(voices), self.num_layers, self.width, num_frames))
        for samples, out in zip(voices, features, strict=True):
            self.encode_into(samples, out, fps)
        return features

    @abstractmethod
    def encode_into(self, samples: np.ndarray, out: Tensor, fps: int) -> None:
        """Write the features of a recording into `out`, zeros [K,E,F]."""

    @abstractmethod
    def encode_block(self, held: np.ndarray, frames: range, *, start: int, fps: int = FPS) -> Tensor:
        """Features of the video frames `frames` while the sound is still arriving, on the encoder's device.  -> [K,E,F]

        `held` is the sound from sample `start` to look_ahead_s after the last frame, with at least context_s before the first one.
        Loudness is normalized over all of it.
        """

    def check_fits(self, model: ModelConfig) -> None:
        """Raise ValueError unless the model reads features of this size."""
        layers, width = model.audio.num_audio_layers, model.audio.audio_dim
        if (self.num_layers, self.width) != (layers, width):
            raise ValueError(
                f"model.speech_encoder={model.speech_encoder} gives {self.num_layers} hidden layers of width {self.width}, "
                f"model={model.name} reads {layers} of width {width}; use an encoder that fits, or train a model with "
                f"model.audio.num_audio_layers={self.num_layers} model.audio.audio_dim={self.width}"
            )


def _zeros(shape: tuple[int, ...]) -> Tensor:
    """Zeros in memory, or when larger than IN_MEMORY in a deleted temporary file, so that an hour of speech takes disk space instead.

    Raises ValueError when the disk has too little space: a write to the mapped file would end the process.
    """
    size = 4 * prod(shape)
    if size <= IN_MEMORY:
        return torch.zeros(shape)
    with tempfile.NamedTemporaryFile(prefix="sonic_speech_") as file:
        folder = Path(file.name).parent
        if shutil.disk_usage(folder).free < size:
            need = f"{size / 2**30:.1f} GiB are needed in {folder} for the speech features of a recording this long"
            raise ValueError(f"{need}; free some space there, or name a larger folder as TMPDIR")
        return torch.from_file(file.name, shared=True, size=prod(shape)).reshape(shape)
