"""Speech features for the audio encoder of the DiT: hidden layers by features by video frames, whatever makes them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sonic.data.audio import COLUMNS_PER_FRAME, MELS, SILENT_COLUMN, log_mel
from sonic.encoders.wav2vec import Wav2VecEncoder
from sonic.model.pointwise import gelu


class LogMelEncoder(nn.Module):
    """A small convolutional encoder of log-mel columns, trained to name mouth shapes; it hears 0.8 s to both sides of a frame."""

    FEATURES = 160
    KERNEL = 5
    FAST, SLOW = (1, 2, 4, 1, 2, 4), (1, 2)  # dilations at 50 columns and at 25 frames a second
    MARGIN = 24  # video frames heard to each side, rounded up
    CHUNK = 256  # video frames encoded at a time, so that memory does not grow with the recording

    def __init__(self) -> None:
        super().__init__()
        self.stem = Window(MELS, self.FEATURES, self.KERNEL)
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
    def hear(self, samples: np.ndarray, num_frames: int) -> Tensor:
        """Features of a whole recording, as if silence were around it.  float32 [n] at 16 kHz -> [1,160,F]"""
        columns = self.with_margin(torch.from_numpy(log_mel(samples, num_frames))[None]).to(self.stem.weight)
        pieces = []
        for first in range(0, num_frames, self.CHUNK):
            count = min(self.CHUNK, num_frames - first)
            window = columns[:, COLUMNS_PER_FRAME * first : COLUMNS_PER_FRAME * (first + count + 2 * self.MARGIN)]
            pieces.append(self(window)[:, self.MARGIN : self.MARGIN + count])
        return rearrange(torch.cat(pieces, dim=1), "1 f a -> 1 a f")

    def with_margin(self, columns: Tensor) -> Tensor:
        """Columns [B,2F,40] with MARGIN frames of silence in front and behind."""
        return F.pad(columns, (0, 0, *(2 * (COLUMNS_PER_FRAME * self.MARGIN,))), value=SILENT_COLUMN)


class Window(nn.Linear):
    """A dilated convolution over time, centred and padded with zeros, as one matrix product.

    Ten times faster on a CPU, forward and backward, than torch's Conv1d in bfloat16.
    """

    def __init__(self, width: int, out: int, kernel: int, *, dilation: int = 1) -> None:
        super().__init__(kernel * width, out)
        self.kernel, self.dilation = kernel, dilation

    def forward(self, x: Tensor) -> Tensor:
        """[B,T,C] -> [B,T,C']"""
        reach = self.dilation * (self.kernel // 2)
        padded = F.pad(x, (0, 0, reach, reach))
        shifted = [padded[:, self.dilation * i : self.dilation * i + x.shape[1]] for i in range(self.kernel)]
        return super().forward(torch.cat(shifted, dim=-1))


class _Residual(nn.Module):
    """Norm, dilated convolution, GELU, linear; added to the input."""

    def __init__(self, width: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.conv = Window(width, width, kernel, dilation=dilation)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B,T,C] -> [B,T,C]"""
        return x + self.out(gelu(self.conv(self.norm(x))))


def vary_throat(columns: Tensor, factor: Tensor) -> Tensor:
    """The same words from throats that are shorter (factor < 1) or longer: log-mel columns with their mel axis stretched.

    columns [B,T,40], factor [B,1], or [B,40] where it differs along the mel axis -> [B,T,40]
    Source: vocal tract length perturbation, Jaitly and Hinton 2013.
    """
    place = ((torch.arange(MELS, device=factor.device) + 0.5) * factor - 0.5).clamp(0, MELS - 1)
    below = place.long().clamp(max=MELS - 2)
    share = rearrange((place - below).to(columns.dtype), "b m -> b 1 m")
    pick_row = lambda rows: columns.gather(2, rearrange(rows, "b m -> b 1 m").expand_as(columns))  # noqa: E731
    return torch.lerp(pick_row(below), pick_row(below + 1), share)


# name -> module with hear(samples float32 [n] at 16 kHz, number of video frames) giving [N, A, F]: N hidden layers of A features
SPEECH_ENCODERS: dict[str, Callable[[], nn.Module]] = {"logmel": LogMelEncoder, "wav2vec2": Wav2VecEncoder}
