"""Computes the speech features of sound that is still arriving, one block at a time.

A block of frames needs the sound until its encoder's `look_ahead_s` after its last frame, and is generated as soon as that has arrived.
Loudness is normalized over the last minute before that point, and never over later sound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from sonic.data.audio import SAMPLE_RATE
from sonic.data.live_audio import LiveAudio
from sonic.encoders.speech_encoder import SpeechEncoder
from sonic.geometry import BlockSpan, plan_blocks
from sonic.types import Conditions


class LiveFeatures:
    """The speech features and the blocks of a video whose sound is still arriving."""

    def __init__(self, sound: LiveAudio, encoder: SpeechEncoder) -> None:
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
            held, frames = self.sound.before(self.stop(span)), range(span.first_frame, span.first_frame + span.frames)
            self._last = (span, self.encoder.encode_block(held, frames, start=self.sound.start, fps=self.sound.fps)[None])
        return self._last[1]

    def conditions(self, whole: Conditions) -> LiveConditions:
        """The conditions of the video: `whole`, which hold for all blocks, with the speech features of each block computed on demand."""
        return LiveConditions(whole.ref, whole.text, motion=whole.motion, masks=whole.masks, features=self.of)


@dataclass(frozen=True)
class LiveConditions(Conditions):
    """Conditions whose audio is computed block by block by `features`. They cannot be sent to other ranks.

    `silent` means without audio.
    """

    features: Callable[[BlockSpan], Tensor] | None = None
    silent: bool = False

    def at(self, span: BlockSpan) -> Conditions:
        """The conditions of one block."""
        block = Conditions(self.ref, self.text, audio=self.features(span).to(self.ref.dtype), motion=self.motion, masks=self.masks)
        return block.drop("audio") if self.silent else block

    def drop(self, name: str) -> Conditions:
        """A copy without the condition `name`."""
        return replace(self, silent=True) if name == "audio" else super().drop(name)
