"""Computes the speech features of sound that is still arriving, one block at a time.

A block of frames needs the sound until `look_ahead_s` after its last frame, and is generated as soon as that has arrived. The preview's
encoder reads MARGIN frames on both sides and half a window of the spectrum; the wav2vec2 of a published model reads CONTEXT_S before
the block and LOOK_AHEAD_S after it. Loudness is normalized over the last minute before that point, and never over later sound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from sonic.data.audio import COLUMNS_PER_FRAME, SAMPLE_RATE, SILENT_COLUMN, log_mel, loudness_gain
from sonic.data.live_audio import LiveAudio
from sonic.encoders.speech import LogMelEncoder
from sonic.encoders.wav2vec import PICKED_PER_S, STATE_RECEPTIVE_FIELD, STATE_SAMPLES, STATES_PER_S, Wav2VecEncoder, states_at
from sonic.geometry import FPS, BlockSpan, plan_blocks
from sonic.types import Conditions

SAMPLES_PER_FRAME = SAMPLE_RATE // FPS  # audio samples per video frame of the preview
HALF_WINDOW = 160  # samples that the spectrum window of the last column reaches beyond its hop
CONTEXT_S, LOOK_AHEAD_S = 4.0, 1.0  # seconds of sound that wav2vec2 reads before and after a block


class LiveEncoder(Protocol):
    """Computes the speech features of a block of frames from a window of the sound."""

    look_ahead_s: float

    def encode(self, sound: LiveAudio, span: BlockSpan, stop: int) -> Tensor:
        """Speech features [1,K,E,F] of the frames of a block; the sound must have been received up to sample `stop`."""


class LiveLogMel:
    """The log-mel encoder of the preview. Given the loudness of the whole recording, it would equal the encoder of recordings."""

    look_ahead_s = LogMelEncoder.MARGIN / FPS + HALF_WINDOW / SAMPLE_RATE

    def __init__(self, encoder: LogMelEncoder) -> None:
        self.encoder = encoder

    @torch.no_grad()
    def encode(self, sound: LiveAudio, span: BlockSpan, stop: int) -> Tensor:
        """Speech features [1,1,160,F] of the frames of a block."""
        margin, last = self.encoder.MARGIN, span.first_frame + span.frames + self.encoder.MARGIN
        first = max(0, span.first_frame - margin)
        lead = min(1, first)  # the spectrum window of the first column reaches into the frame before it
        samples = sound.window((first - lead) * SAMPLES_PER_FRAME, stop)
        columns = log_mel(samples, last - first + lead, gain=loudness_gain(sound.before(stop)))[COLUMNS_PER_FRAME * lead :]
        missing = COLUMNS_PER_FRAME * (margin - (span.first_frame - first))  # columns before the start of the sound
        columns = np.pad(columns, ((missing, 0), (0, 0)), constant_values=SILENT_COLUMN)
        features = self.encoder(torch.from_numpy(columns)[None].to(self.encoder.stem.weight))
        return rearrange(features[:, margin : margin + span.frames], "1 f a -> 1 1 a f")


class LiveWav2Vec:
    """The wav2vec2 encoder of the published models, run on a window around each block.

    States at 50 Hz are interpolated at exact times to 30 Hz. The encoder of whole recordings stretches them slightly instead, so that
    the first and the last state are kept.
    """

    look_ahead_s = LOOK_AHEAD_S

    def __init__(self, encoder: Wav2VecEncoder) -> None:
        self.encoder = encoder

    @torch.no_grad()
    def encode(self, sound: LiveAudio, span: BlockSpan, stop: int) -> Tensor:
        """Speech features [1,K,E,F] of the frames of a block, with K = layers + 1; zeros after the end of the sound."""
        begun = span.first_frame / sound.fps - CONTEXT_S
        first_state = max(0, int(begun * STATES_PER_S))
        samples, level = sound.window(first_state * STATE_SAMPLES, stop), sound.before(stop)
        config = self.encoder.encoder.config
        out = torch.zeros(1, config.num_hidden_layers + 1, config.hidden_size, span.frames)
        if len(samples) < STATE_RECEPTIVE_FIELD:
            return out
        wave = (samples - level.mean()) / np.sqrt(level.var() + 1e-7)
        states = self.encoder.hidden_states(torch.from_numpy(wave.astype(np.float32)))
        picked = np.round(np.arange(span.first_frame, span.first_frame + span.frames) / sound.fps * PICKED_PER_S)
        positions = picked * STATES_PER_S / PICKED_PER_S - first_state
        inside = np.flatnonzero(positions < states.shape[1])
        out[0][..., torch.from_numpy(inside)] = states_at(states, positions[inside])
        return out


class LiveFeatures:
    """The speech features and the blocks of a video whose sound is still arriving."""

    def __init__(self, sound: LiveAudio, encoder: LiveEncoder) -> None:
        self.sound, self.encoder = sound, encoder
        self._last: tuple[BlockSpan | None, Tensor | None] = (None, None)

    def spans(self, block_frames: int) -> Iterator[BlockSpan]:
        """Yield the blocks of the video, each as soon as the sound that it needs has arrived."""
        for span in plan_blocks(None, block_frames):
            self.sound.receive(self.stop(span))
            if not self.sound.frames_left(span.first_frame, 1):
                return
            yield span

    def stop(self, span: BlockSpan) -> int:
        """The end of the sound that a block needs: the index after its last sample."""
        seconds = (span.first_frame + span.frames) / self.sound.fps + self.encoder.look_ahead_s
        return round(seconds * SAMPLE_RATE)

    def of(self, span: BlockSpan) -> Tensor:
        """Speech features [1,K,E,F] of a block. The last block is cached, because guidance asks for it twice."""
        if self._last[0] != span:
            self._last = (span, self.encoder.encode(self.sound, span, self.stop(span)))
        return self._last[1]

    def conditions(self, whole: Conditions) -> LiveConditions:
        """The conditions of the video: `whole`, which hold for all blocks, with the speech features of each block computed on demand."""
        return LiveConditions(whole.ref, whole.text, motion=whole.motion, features=self.of)


@dataclass(frozen=True)
class LiveConditions(Conditions):
    """Conditions whose audio is computed block by block by `features`. They cannot be sent to other ranks.

    `silent` means without audio.
    """

    features: Callable[[BlockSpan], Tensor] | None = None
    silent: bool = False

    def at(self, span: BlockSpan) -> Conditions:
        """The conditions of one block."""
        block = Conditions(self.ref, self.text, audio=self.features(span).to(self.ref), motion=self.motion)
        return block.drop("audio") if self.silent else block

    def drop(self, name: str) -> Conditions:
        """A copy without the condition `name`."""
        return replace(self, silent=True) if name == "audio" else super().drop(name)
