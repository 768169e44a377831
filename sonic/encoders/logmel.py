"""The preview's own speech encoder: a small network of log-mel columns, trained on mouth shapes."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sonic.config import ModelConfig, require
from sonic.data.audio import COLUMNS_PER_FRAME, MELS, SAMPLE_RATE, SILENT_COLUMN, log_mel, loudness_gain
from sonic.encoders.speech_encoder import SpeechEncoder
from sonic.geometry import FPS
from sonic.model.cpu import gelu
from sonic.types import upload

VISEMES = 5  # that it learns: opening, width, press, teeth, tongue
SAMPLES_PER_FRAME = SAMPLE_RATE // FPS
HALF_WINDOW = 160  # samples that the spectrum window of the last column reaches beyond its hop


class LogMelEncoder(SpeechEncoder):
    """A small convolutional encoder of log-mel columns, trained to classify mouth shapes (K = 1).

    A frame's features depend on the 0.8 s before and after it.
    """

    FEATURES = 160
    KERNEL = 5
    FAST, SLOW = (1, 2, 4, 1, 2, 4), (1, 2)  # dilations at 50 columns and at 25 frames a second
    MARGIN = 24  # video frames on each side that a frame's features depend on, rounded up
    CHUNK = 256  # video frames encoded at a time, so that memory does not grow with the recording
    rate = FPS
    context_s = look_ahead_s = MARGIN / FPS + HALF_WINDOW / SAMPLE_RATE
    num_layers, width = 1, FEATURES

    def __init__(self) -> None:
        super().__init__()
        self.stem = TimeConv(MELS, self.FEATURES, self.KERNEL)
        self.fast = nn.ModuleList(_Residual(self.FEATURES, self.KERNEL, dilation) for dilation in self.FAST)
        self.shrink = nn.Linear(COLUMNS_PER_FRAME * self.FEATURES, self.FEATURES)
        self.slow = nn.ModuleList(_Residual(self.FEATURES, self.KERNEL, dilation) for dilation in self.SLOW)

    def forward(self, columns: Tensor) -> Tensor:
        """Log-mel columns [B,2F,40] -> features [B,F,160] of unit variance"""
        x = self.stem(columns)
        for layer in self.fast:
            x = layer(x)
        x = self.shrink(rearrange(x, "b (f c) d -> b f (c d)", c=COLUMNS_PER_FRAME))
        for layer in self.slow:
            x = layer(x)
        return F.layer_norm(x, (self.FEATURES,))

    def encode_into(self, samples: np.ndarray, out: Tensor, fps: int) -> None:
        """Write the features of a recording, padded with silence on both sides, into `out` [1,160,F]."""
        num_frames = out.shape[-1]
        columns = self.with_margin(torch.from_numpy(log_mel(samples, num_frames))[None]).to(self.stem.weight)
        for first in range(0, num_frames, self.CHUNK):
            count = min(self.CHUNK, num_frames - first)
            window = columns[:, COLUMNS_PER_FRAME * first : COLUMNS_PER_FRAME * (first + count + 2 * self.MARGIN)]
            features = self(window)[:, self.MARGIN : self.MARGIN + count]
            out[..., first : first + count] = rearrange(features, "1 f e -> 1 e f")

    @torch.no_grad()
    def encode_block(self, held: np.ndarray, frames: range, *, start: int, fps: int = FPS) -> Tensor:
        """Features of the video frames `frames`. Given the loudness of the whole recording, they would equal those of recordings."""
        first, last = max(0, frames.start - self.MARGIN), frames.stop + self.MARGIN
        lead = min(1, first)  # the spectrum window of the first column reaches into the frame before it
        samples = held[(first - lead) * SAMPLES_PER_FRAME - start :]
        columns = log_mel(samples, last - first + lead, gain=loudness_gain(held))[COLUMNS_PER_FRAME * lead :]
        missing = COLUMNS_PER_FRAME * (self.MARGIN - (frames.start - first))  # columns before the start of the sound
        columns = np.pad(columns, ((missing, 0), (0, 0)), constant_values=SILENT_COLUMN)
        features = self(upload(torch.from_numpy(columns)[None], self.stem.weight.device).to(self.stem.weight))
        return rearrange(features[:, self.MARGIN : self.MARGIN + len(frames)], "1 f e -> 1 e f")

    def check_fits(self, model: ModelConfig) -> None:
        """Raise ValueError unless the model reads features of this size, at this rate."""
        super().check_fits(model)
        fps, given = model.rollout.fps, f"model.speech_encoder={model.speech_encoder} gives features of {self.rate} video frames a second"
        require(fps == self.rate, f"{given}, model={model.name} makes {fps}; use another speech encoder")

    def with_margin(self, columns: Tensor) -> Tensor:
        """The columns with MARGIN frames of silence before and after them.  [B,2F,40] -> [B,2(F+2·MARGIN),40]"""
        return F.pad(columns, (0, 0, *(2 * (COLUMNS_PER_FRAME * self.MARGIN,))), value=SILENT_COLUMN)


class TimeConv(nn.Linear):
    """A dilated convolution over time, centred and padded with zeros, computed as one matrix product.

    In bfloat16 on a CPU it is ten times faster, forward and backward, than torch's Conv1d.
    """

    def __init__(self, width: int, out: int, kernel: int, *, dilation: int = 1) -> None:
        super().__init__(kernel * width, out)
        self.kernel, self.dilation = kernel, dilation

    def forward(self, x: Tensor) -> Tensor:
        """[B,columns,C] -> [B,columns,C']"""
        padding = self.dilation * (self.kernel // 2)
        padded = F.pad(x, (0, 0, padding, padding))
        shifted = [padded[:, self.dilation * i : self.dilation * i + x.shape[1]] for i in range(self.kernel)]
        return super().forward(torch.cat(shifted, dim=-1))


class _Residual(nn.Module):
    """Norm, dilated convolution, GELU, linear; added to the input."""

    def __init__(self, width: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.conv = TimeConv(width, width, kernel, dilation=dilation)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B,columns,C] -> [B,columns,C]"""
        return x + self.out(gelu(self.conv(self.norm(x))))


def vary_throat(columns: Tensor, factor: Tensor) -> Tensor:
    """Log-mel columns with their mel axis stretched, as if the vocal tract were shorter (factor < 1) or longer.

    columns [B,columns,40], factor [B,1], or [B,40] where it differs along the mel axis -> [B,columns,40]
    Source: vocal tract length perturbation, Jaitly and Hinton 2013.
    """
    channel = ((torch.arange(MELS, device=factor.device) + 0.5) * factor - 0.5).clamp(0, MELS - 1)
    below = channel.long().clamp(max=MELS - 2)
    share = rearrange((channel - below).to(columns.dtype), "b m -> b 1 m")
    pick_row = lambda rows: columns.gather(2, rearrange(rows, "b m -> b 1 m").expand_as(columns))  # noqa: E731
    return torch.lerp(pick_row(below), pick_row(below + 1), share)
