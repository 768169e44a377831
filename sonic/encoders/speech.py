"""Speech encoders: a recording becomes features [K,E,F] of K hidden layers, of width E, one column per video frame."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sonic.data.audio import COLUMNS_PER_FRAME, MELS, SILENT_COLUMN, log_mel
from sonic.encoders.wav2vec import Wav2VecEncoder
from sonic.model.cpu import gelu


class LogMelEncoder(nn.Module):
    """A small convolutional encoder of log-mel columns, trained to classify mouth shapes (K = 1).

    A frame's features depend on the 0.8 s before and after it.
    """

    FEATURES = 160
    KERNEL = 5
    FAST, SLOW = (1, 2, 4, 1, 2, 4), (1, 2)  # dilations at 50 columns and at 25 frames a second
    MARGIN = 24  # video frames on each side that a frame's features depend on, rounded up
    CHUNK = 256  # video frames encoded at a time, so that memory does not grow with the recording

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

    @torch.no_grad()
    def encode_audio(self, samples: np.ndarray, num_frames: int) -> Tensor:
        """Features of a whole recording, padded with silence on both sides.  float32 [samples] at 16 kHz -> [1,160,F]"""
        columns = self.with_margin(torch.from_numpy(log_mel(samples, num_frames))[None]).to(self.stem.weight)
        pieces = []
        for first in range(0, num_frames, self.CHUNK):
            count = min(self.CHUNK, num_frames - first)
            window = columns[:, COLUMNS_PER_FRAME * first : COLUMNS_PER_FRAME * (first + count + 2 * self.MARGIN)]
            pieces.append(self(window)[:, self.MARGIN : self.MARGIN + count])
        return rearrange(torch.cat(pieces, dim=1), "1 f e -> 1 e f")

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


# name -> module with encode_audio(float32 samples [samples] at 16 kHz, number of video frames F) -> features [K,E,F]
SPEECH_ENCODERS: dict[str, Callable[[], nn.Module]] = {"logmel": LogMelEncoder, "wav2vec2": Wav2VecEncoder}
