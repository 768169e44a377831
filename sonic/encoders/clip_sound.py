"""The sound of a clip as Sonic's UNet reads it: audio tokens and two motion buckets per frame, from hidden states of Whisper.

Shapes: `ticks` of 20 ms, K hidden states of width E, n frames of 80 ms, T tokens of width D.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sonic.encoders.whisper import WhisperEncoder

FRAME_TICKS = 4
FRAME_SAMPLES = 1280
TOKEN_TICKS, BUCKET_TICKS = (4, 6), (24, 26)  # ticks before the beginning of a frame that its window holds, and ticks after it
BATCH = 256  # frames that are encoded together, so that memory does not grow with the length
BUCKET_SCALE, BUCKET_SHIFT = 16, 16


class ClipSound(NamedTuple):
    """tokens [n,T,D], those of frames without sound [T,D], and motion buckets [n,2]."""

    tokens: Tensor
    silence: Tensor
    buckets: Tensor


def tick_windows(states: Tensor, ticks: tuple[int, int], *, step: int = FRAME_TICKS) -> Tensor:
    """A view of the states around the beginning of each frame of `step` ticks, or zeros.  [ticks,...] -> [n,window,...]"""
    padded = F.pad(states, (0, 0) * (states.dim() - 1) + ticks)
    return padded.unfold(0, sum(ticks), step)[: len(states) // step].movedim(-1, 1)


class FrameTokens(nn.Module):
    """Audio tokens of a frame from the states around it. The names of its tensors are published ones, those of audio2token."""

    def __init__(self, inputs: int = 19200, hidden: int = 1024, *, tokens: int = 32, width: int = 1024) -> None:
        super().__init__()
        self.proj1, self.proj2, self.proj3 = nn.Linear(inputs, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, tokens * width)
        self.norm = nn.LayerNorm(width)

    def forward(self, windows: Tensor) -> Tensor:
        """[n,window,K,E] -> [n,T,D]"""
        found = self.proj3(F.relu(self.proj2(F.relu(self.proj1(windows.flatten(1))))))
        return self.norm(rearrange(found, "n (t d) -> n t d", d=self.norm.normalized_shape[0]))

    def silence(self) -> Tensor:
        """The tokens [T,D] of a window of zeros, which are not zeros."""
        return self(self.proj1.weight.new_zeros(1, self.proj1.in_features))[0]


class FrameBuckets(nn.Module):
    """Motion buckets of a frame from the last states around it and the picture. The names of its tensors are those of audio2bucket."""

    def __init__(self, inputs: int = 20224, hidden: int = 1024) -> None:
        super().__init__()
        self.proj1, self.proj2, self.proj3 = nn.Linear(inputs, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 2)

    def forward(self, windows: Tensor, image_embed: Tensor) -> Tensor:
        """[n,window,E], [D] -> [n,2] movement of the head and strength of the expression"""
        seen = torch.cat((windows.flatten(1), image_embed.expand(len(windows), -1)), dim=1)
        return self.proj3(F.silu(self.proj2(F.silu(self.proj1(seen))))) * BUCKET_SCALE + BUCKET_SHIFT


class ClipSoundEncoder(nn.Module):
    """Whisper, and the two networks that read its states."""

    def __init__(self, whisper: WhisperEncoder, tokens: FrameTokens, buckets: FrameBuckets) -> None:
        super().__init__()
        self.whisper, self.tokens, self.buckets = whisper, tokens, buckets

    @torch.no_grad()
    def states(self, samples: np.ndarray) -> Tensor:
        """Whisper's states of a recording, an even number of ticks.  float32 [samples] at 16 kHz -> [ticks,K,E]"""
        return self.whisper.chunk_states(samples)[: len(samples) // (FRAME_SAMPLES // 2) * (FRAME_TICKS // 2)]

    @torch.no_grad()
    def of_states(self, states: Tensor, image_embed: Tensor) -> ClipSound:
        """What the UNet reads of the states [ticks,K,E] of a clip with a picture whose CLIP embedding is [D]."""
        around = tick_windows(states, TOKEN_TICKS).split(BATCH)
        tokens = torch.cat([self.tokens(windows) for windows in around])
        last = tick_windows(states[:, -1], BUCKET_TICKS).split(BATCH)
        return ClipSound(tokens, self.tokens.silence(), torch.cat([self.buckets(windows, image_embed) for windows in last]))

    def forward(self, samples: np.ndarray, frames: int, image_embed: Tensor) -> ClipSound:
        """What the UNet reads of a recording in `frames` frames, which it is cut to. Raises ValueError when it is shorter."""
        whole = len(samples) // FRAME_SAMPLES
        if not 1 <= frames <= whole:
            raise ValueError(
                f"{len(samples)} samples at 16 kHz are {whole} frames of {FRAME_SAMPLES} samples, not {frames}; give more sound"
            )
        states = self.states(samples if frames == whole else samples[: frames * FRAME_SAMPLES])
        return self.of_states(states, image_embed.to(states))
