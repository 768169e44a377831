"""Speech features of sound that is still arriving, block by block: what each block waits for, and the conditions that it gets.

A block of frames needs the sound until `look_ahead_s` after its last frame and is made as soon as that is there. The preview's encoder
reads MARGIN frames to both sides and half a window of its spectrum; of a published model wav2vec2 sees CONTEXT_S before the block and
LOOK_AHEAD_S after it. Loudness is evened out over the last minute before that point, never over what comes later.
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
from sonic.encoders.wav2vec import PICKED_PER_S, STATE_RECEPTIVE_FIELD, STATE_SAMPLES, STATES_PER_S, Wav2VecEncoder
from sonic.geometry import FPS, BlockSpan, plan_blocks
from sonic.types import Conditions, FrameChunk

SAMPLES_PER_FRAME = SAMPLE_RATE // FPS  # of the preview
HALF_WINDOW = 160  # samples of the spectrum around the last column that lie behind its hop
CONTEXT_S, LOOK_AHEAD_S = 4.0, 1.0  # of wav2vec2 before and after a block


class LiveEncoder(Protocol):
    """Makes the speech features of a block of frames out of a window of the sound."""

    look_ahead_s: float

    def encode(self, sound: LiveAudio, span: BlockSpan, stop: int) -> Tensor:
        """Features [1,N,E,F] of the frames of a block; the sound has been received until sample `stop`."""


class LiveLogMel:
    """The preview's encoder: with the loudness of a whole recording at hand it gives what it gives of the recording."""

    look_ahead_s = LogMelEncoder.MARGIN / FPS + HALF_WINDOW / SAMPLE_RATE

    def __init__(self, encoder: LogMelEncoder) -> None:
        self.encoder = encoder

    @torch.no_grad()
    def encode(self, sound: LiveAudio, span: BlockSpan, stop: int) -> Tensor:
        """Features [1,1,160,F] of the frames of a block."""
        margin, last = self.encoder.MARGIN, span.first_frame + span.frames + self.encoder.MARGIN
        first = max(0, span.first_frame - margin)
        lead = min(1, first)  # a frame more in front, into which the window of the first column reaches
        samples = sound.window((first - lead) * SAMPLES_PER_FRAME, stop)
        columns = log_mel(samples, last - first + lead, gain=loudness_gain(sound.before(stop)))[COLUMNS_PER_FRAME * lead :]
        missing = COLUMNS_PER_FRAME * (margin - (span.first_frame - first))  # before the beginning
        columns = np.pad(columns, ((missing, 0), (0, 0)), constant_values=SILENT_COLUMN)
        features = self.encoder(torch.from_numpy(columns)[None].to(self.encoder.stem.weight))
        return rearrange(features[:, margin : margin + span.frames], "1 f a -> 1 1 a f")


class LiveWav2Vec:
    """The published models' encoder over a window around each block. Its states lie 50 to 30 exactly; those of a recording are
    stretched a little, so that its first and last state stay the first and last."""

    look_ahead_s = LOOK_AHEAD_S

    def __init__(self, encoder: Wav2VecEncoder) -> None:
        self.encoder = encoder

    @torch.no_grad()
    def encode(self, sound: LiveAudio, span: BlockSpan, stop: int) -> Tensor:
        """Features [1,layers+1,D,F] of the frames of a block; zeros after the end of the sound."""
        begun = span.first_frame / sound.fps - CONTEXT_S
        first_state = max(0, int(begun * STATES_PER_S))
        samples, level = sound.window(first_state * STATE_SAMPLES, stop), sound.before(stop)
        config = self.encoder.encoder.config
        out = torch.zeros(1, config.num_hidden_layers + 1, config.hidden_size, span.frames)
        if len(samples) < STATE_RECEPTIVE_FIELD:
            return out
        wave = (samples - level.mean()) / np.sqrt(level.var() + 1e-7)
        states = self.encoder.layers(torch.from_numpy(wave.astype(np.float32)))
        picked = np.round(np.arange(span.first_frame, span.first_frame + span.frames) / sound.fps * PICKED_PER_S)
        positions = picked * STATES_PER_S / PICKED_PER_S - first_state
        inside = np.flatnonzero(positions < states.shape[1])
        within = torch.from_numpy(positions[inside])
        below = within.long()
        above = (below + 1).clamp(max=states.shape[1] - 1)
        found = torch.lerp(states[:, below], states[:, above], (within - below)[:, None].to(states))
        out[0][..., torch.from_numpy(inside)] = found.mT.float().cpu()
        return out


class LiveFeatures:
    """The speech features of a video whose sound is still arriving, and its blocks as their sound is there."""

    def __init__(self, sound: LiveAudio, encoder: LiveEncoder) -> None:
        self.sound, self.encoder = sound, encoder
        self._last: tuple[BlockSpan | None, Tensor | None] = (None, None)

    def spans(self, block_frames: int) -> Iterator[BlockSpan]:
        """The blocks of the video, each once the sound that it needs is there."""
        for span in plan_blocks(None, block_frames):
            self.sound.receive(self.stop(span))
            if not self.sound.frames_left(span.first_frame, 1):
                return
            yield span

    def stop(self, span: BlockSpan) -> int:
        """The sample behind the last one that a block needs."""
        seconds = (span.first_frame + span.frames) / self.sound.fps + self.encoder.look_ahead_s
        return round(seconds * SAMPLE_RATE)

    def of(self, span: BlockSpan) -> Tensor:
        """Features [1,N,E,F] of a block; guidance asks twice for the same."""
        if self._last[0] != span:
            self._last = (span, self.encoder.encode(self.sound, span, self.stop(span)))
        return self._last[1]

    def conditions(self, whole: Conditions) -> LiveConditions:
        """The conditions of the video: those of all of it, and the features of each block as they come."""
        return LiveConditions(whole.ref, whole.text, motion=whole.motion, features=self.of)

    def cut(self, chunks: Iterator[FrameChunk]) -> Iterator[FrameChunk]:
        """The frames until the end of the sound."""
        for chunk in chunks:
            count = self.sound.frames_left(chunk.start, len(chunk))
            if count:
                yield replace(chunk, pixels=chunk.pixels[:count])


@dataclass(frozen=True)
class LiveConditions(Conditions):
    """Conditions whose audio is asked for block by block; on one rank, because it cannot be sent."""

    features: Callable[[BlockSpan], Tensor] | None = None
    silent: bool = False

    def at(self, span: BlockSpan) -> Conditions:
        """The conditions of one block."""
        block = Conditions(self.ref, self.text, audio=self.features(span).to(self.ref), motion=self.motion)
        return block.drop("audio") if self.silent else block

    def drop(self, name: str) -> Conditions:
        """The same with one condition off."""
        return replace(self, silent=True) if name == "audio" else super().drop(name)


LIVE_ENCODERS: dict[str, type[LiveLogMel] | type[LiveWav2Vec]] = {"logmel": LiveLogMel, "wav2vec2": LiveWav2Vec}  # by model.speech_encoder
