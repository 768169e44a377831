"""Converts sound in memory: a live stream of chunks to one 16 kHz recording of which the last minute is kept, and whole arrays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from sonic.data.audio import SAMPLE_RATE, check_length, check_level, resample
from sonic.geometry import FPS, frames_of_audio
from sonic.types import Speech

HELD_S = 60  # seconds of sound kept before the last requested sample; loudness is measured over them
FULL_SCALE = {"int16": 1 << 15, "int32": 1 << 31}  # of integer samples


class LiveAudio:
    """A recording that is still arriving, at 16 kHz mono. Chunks are taken from the iterator only when `receive` needs them."""

    def __init__(self, chunks: Iterable[Any], *, fps: int = FPS, max_frames: int = 0) -> None:
        """Each chunk is (samples [n] or [n,channels], sample rate in Hz), or samples alone at 16 kHz.

        The video has at most `max_frames` frames; 0 means no limit.
        """
        self.fps, self.max_frames = fps, max_frames
        self.ended = False
        self._source = _at_16_khz(chunks)
        self._pending: list[np.ndarray] = []
        self._kept = (0, np.zeros(0, np.float32))  # index of the first sample that is kept, and those from there on
        self.received = 0  # number of samples received so far

    def receive(self, stop: int) -> None:
        """Read chunks until sample `stop` - 1 has arrived or the sound ends; drop sound that is more than HELD_S before `stop`.

        Raises ValueError for a chunk that is not sound, and when the sound ends before the shortest allowed length.
        """
        while not self.ended and self.received < stop:
            chunk = next(self._source, None)
            if chunk is None:
                self.ended = True
            else:
                self._pending.append(chunk)
                self.received += len(chunk)
        if self.ended:
            check_length(self.received / SAMPLE_RATE, "audio")
        start, held = self._kept
        forgotten = max(0, min(stop, self.received) - HELD_S * SAMPLE_RATE - start)
        self._kept = (start + forgotten, np.concatenate([held, *self._pending])[forgotten:])
        self._pending = []

    def window(self, first: int, stop: int) -> np.ndarray:
        """Samples `first` to `stop`, fewer at the end of the sound. They must have been received, and `first` must still be kept."""
        start, held = self._kept
        assert first >= start, f"sample {first} is forgotten; held are those from {start}"
        return held[first - start : max(0, stop - start)]

    @property
    def start(self) -> int:
        """Index of the first sample that is kept."""
        return self._kept[0]

    def before(self, stop: int) -> np.ndarray:
        """All kept samples before sample `stop`."""
        return self.window(self.start, stop)

    def since(self, first: int) -> np.ndarray:
        """The kept samples from `first` on, in any thread; none when `first` is no longer kept."""
        start, held = self._kept
        return held[first - start if first >= start else len(held) :]

    @property
    def num_frames(self) -> int | None:
        """Number of video frames: the upper limit while the sound is still arriving, None if there is no limit."""
        known = frames_of_audio(self.received, SAMPLE_RATE, self.fps) if self.ended else None
        return min((limit for limit in (known, self.max_frames) if limit), default=None)

    def frames_left(self, start: int, count: int) -> int:
        """How many of the `count` frames from `start` belong to the video; all of them while its length is unknown."""
        return count if self.num_frames is None else max(0, min(count, self.num_frames - start))


def mono_samples(samples: Any, called: str = "audio") -> np.ndarray:
    """Sound in memory converted to mono float32 [n] in [-1,1]; channels are averaged.

    `samples` are [n] or [n,channels] with up to 8 channels, floats in [-1,1], int16 or int32. Raises ValueError for anything else, and
    for numbers that are not finite; `called` names the sound in the message.
    """
    found = np.asarray(samples)
    scale = FULL_SCALE.get(found.dtype.name, 1)
    channels = found.shape[1] if found.ndim == 2 else 1
    if found.ndim not in (1, 2) or not 1 <= channels <= 8 or (scale == 1 and found.dtype.kind != "f"):
        given = f"{found.dtype} {list(found.shape)}"
        raise ValueError(f"{called} is {given}; give floats in [-1,1] or int16, as [samples] or [samples,channels]")
    mono = found.astype(np.float32) / np.float32(scale)
    mono = mono.mean(axis=1) if found.ndim == 2 else mono
    if not np.isfinite(mono).all():
        raise ValueError(f"{called} holds numbers that are not finite; give an undamaged recording")
    return np.clip(mono, -1, 1)


def checked_rate(rate: Any, called: str = "audio") -> int:
    """The sample rate in Hz as an int. Raises ValueError unless it is a whole number between 4000 and 768000."""
    if not isinstance(rate, int | np.integer) or not 4000 <= rate <= 768_000:
        raise ValueError(f"{called} has sample_rate={rate}; give a whole number of Hz between 4000 and 768000, such as 16000")
    return int(rate)


def _at_16_khz(chunks: Iterable[Any]) -> Iterator[np.ndarray]:
    """Yield the chunks as 16 kHz mono. The samples do not depend on how the sound is cut into chunks.

    Raises ValueError for a chunk that is not sound, or that has another sample rate than the chunks before it.
    """
    resampler, rate = None, None
    for index, chunk in enumerate(chunks):
        called = f"chunk {index} of audio"
        samples, given = chunk if isinstance(chunk, tuple) and len(chunk) == 2 else (chunk, SAMPLE_RATE)
        given = checked_rate(given, called)
        if rate not in (None, given):
            raise ValueError(f"{called} has sample_rate={given}, the chunks before it {rate}; give all of them at one rate")
        mono = mono_samples(samples, called)
        if rate is None and given != SAMPLE_RATE:
            from soxr import ResampleStream

            resampler = ResampleStream(given, SAMPLE_RATE, 1)
        rate = given
        yield mono if resampler is None else np.clip(resampler.resample_chunk(mono), -1, 1)
    if resampler is not None:
        yield np.clip(resampler.resample_chunk(np.zeros(0, np.float32), last=True), -1, 1)


def speech_in_memory(samples: Any, rate: Any) -> tuple[Speech, Speech]:
    """A recording in memory, at 16 kHz for the model and at its own sample rate for the video.

    Raises ValueError when it is not sound, too short or silent, as `load_speech` does for a file.
    """
    own = Speech(mono_samples(samples), checked_rate(rate))
    check_length(own.seconds, "audio")
    speech = own if own.sample_rate == SAMPLE_RATE else Speech(np.clip(resample(own.samples, own.sample_rate, SAMPLE_RATE), -1, 1))
    check_level(speech.samples, "audio")
    return speech, own
