"""Decodes audio files and sound tracks to float samples.

Gaps between time stamps become silence, and sample rate and channel layout may change within a file. Both the input of the speech encoder
and the sound track of the video are decoded here, so they agree on the time of every sample.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, takewhile
from pathlib import Path

import av
import numpy as np
from av import AudioFrame, AudioLayout, AudioResampler
from av.stream import Disposition
from einops import rearrange, repeat

from sonic.data.media import open_media

SMALLEST_GAP_S = 0.01  # a smaller gap between time stamps is rounding or jitter
LONGEST_GAP_S = 600.0  # a longer gap is a wrong time stamp, not a pause
_RESTART_S = 0.1  # time stamps that jump back by more have restarted
_LOOKAHEAD = 16  # decoded frames that must agree on a jump of the time stamps
_MEAN = -1  # channel index that means: the mean of all channels
_MIX_S = 0.5  # the channels are mixed in blocks of this length
_FADE = 80  # samples over which the mix changes from one block to the next
_INAUDIBLE = 1e-8  # power of a channel that counts as silent, -80 dBFS
_CANCELLED = 0.25  # the channels cancel out when their mean has less than this share of the power the loudest alone would give
_MIX_OPTIONS = {"lfe_mix_level": 1}  # FFmpeg guesses the layout of unnamed channels: the one it takes for bass may carry the speech
_DAMAGED = 0.1  # a file is refused when a larger share of its packets cannot be decoded, or of its seconds is missing
_KEEP_CLOCK = {"matroska", "webm", "mov", "mp4", "mpegts", "mpeg", "asf", "ogg", "flv", "nut", "rm", "mxf", "wtv"}  # have time stamps
_STATE_LENGTH = {"wav", "w64", "flac", "aiff", "au", "caf", "mov", "mp4", "tta", "ape", "wv"}  # length in the header, not estimated


class NoSound(ValueError):
    """Raised for a video without an audio stream, or with an empty one."""


@dataclass
class ClockReport:
    """Findings about a file's time stamps in seconds, filled in while it is decoded.

    `start_s` is the time of the first sample, None before it is decoded; `silence_s` the total length of the gaps filled with silence;
    `left_out_s` the total length of the jumps that were ignored as too long.
    """

    start_s: float | None = None
    silence_s: float = 0.0
    left_out_s: float = 0.0

    def sentence(self, name: str) -> str:
        """One sentence for the user about gaps in the time stamps; empty when there are none."""
        message = []
        if self.silence_s:
            message.append(f"{self.silence_s:.2f} s are missing between its time stamps and became silence of that length")
        if self.left_out_s:
            message.append(f"its time stamps jump by {self.left_out_s:.0f} s, which is too long for a pause and was left out")
        return f"{name}: {'; '.join(message)}" if message else ""


def only_sound(container, path: Path):
    """The audio stream of a recording. Raises ValueError for a picture, a video (a cover picture is allowed) or a file without sound."""
    moving = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if moving and not container.streams.audio and (moving[0].frames == 1 or "pipe" in container.format.name):
        raise ValueError(f"audio={path} is a picture; give a recording (wav, mp3, flac, m4a or ogg)")
    if moving:
        raise ValueError(f"audio={path} is a video; extract its sound first, for example: ffmpeg -i {path.name} {path.stem}.wav")
    if not container.streams.audio:
        raise ValueError(f"audio={path} has no sound in it; give a recording (wav, mp3, flac, m4a or ogg)")
    return container.streams.audio[0]


def soundtrack(container, path: Path):
    """The first audio stream of a video. Raises NoSound when there is none."""
    if not container.streams.audio:
        raise NoSound(f"video={path} has no sound in it; give one with speech")
    return container.streams.audio[0]


def sound_format(path: Path) -> tuple[int, int]:
    """Sample rate in Hz and number of channels of the first decoded audio frame of a recording."""
    with open_media(path) as container:
        frame = next(_decoded(container, only_sound(container, path)))
        return frame.sample_rate, frame.layout.nb_channels


def track_seconds(path: Path) -> float:
    """Duration in seconds of a video's sound track by its time stamps, as a player has it. Raises NoSound when there is none."""
    with open_media(path) as container:
        stream = soundtrack(container, path)
        ends = [packet.pts + (packet.duration or 0) for packet in container.demux(stream) if packet.pts is not None]
        return float((max(ends, default=0) - (stream.start_time or 0)) * stream.time_base)


def decode_sound(
    path: Path, *, rate: int, layout: str = "", choose: Callable = only_sound, report: ClockReport | None = None
) -> Iterator[np.ndarray]:
    """Decode the sound of a file in pieces, float32 [channels, n] at `rate` Hz.

    `layout` is "mono", "stereo", or "" for the file's own channels. `choose(container, path)` selects the stream; `report` receives the
    findings about the time stamps. Raises ValueError for a damaged file, samples that are not finite, and whatever `choose` refuses.
    """
    report = report or ClockReport()
    damaged = f"audio={path} cannot be decoded ({{}}); give an undamaged wav, mp3, flac, m4a or ogg file"
    decoded = promised = 0.0
    try:
        with open_media(path) as container:
            stream = choose(container, path)
            if stream.codec_context is None:
                raise ValueError(damaged.format("its codec is unknown"))
            kinds = set(container.format.name.split(","))
            if stream.duration is not None and _STATE_LENGTH & kinds:  # else FFmpeg estimates it
                promised = float(stream.duration * stream.time_base)
            keeps_clock = _KEEP_CLOCK & kinds
            stamped = ((frame, frame.time if keeps_clock else None) for frame in _decoded(container, stream))
            for piece in _converted(_with_pauses(stamped, report), rate, layout):
                if not np.isfinite(piece).all():
                    raise ValueError(f"audio={path} holds samples that are not numbers (NaN or infinity); save it again as 16-bit wav")
                decoded += piece.shape[1] / rate
                yield piece
    except av.FFmpegError as error:
        raise ValueError(damaged.format(error.strerror or "unknown format")) from error
    if decoded < (1 - _DAMAGED) * promised:
        raise ValueError(damaged.format(f"only {decoded:.1f} of {promised:.1f} s are readable"))


def mix_down(pieces: Iterator[np.ndarray], rate: int) -> Iterator[np.ndarray]:
    """Mix the channels to one: their mean, or the loudest alone where they cancel out in the mean.  [channels, n] -> [n]"""
    for block, last, chosen in _choices(pieces, rate):
        mean = block.mean(axis=0, dtype=np.float32)
        yield _faded(*(mean if channel == _MEAN else block[channel] for channel in (last, chosen)))


def keep_audible(pieces: Iterator[np.ndarray], rate: int) -> Iterator[np.ndarray]:
    """Keep the channels, but where they would cancel out on a single loudspeaker put the loudest on all of them.  [channels, n]"""
    for block, last, chosen in _choices(pieces, rate):
        yield _faded(*(block if channel == _MEAN else np.broadcast_to(block[channel], block.shape) for channel in (last, chosen)))


def _choices(pieces: Iterator[np.ndarray], rate: int) -> Iterator[tuple[np.ndarray, int, int]]:
    """Blocks of sound [channels, n], each with the channel chosen for the block before it and for itself (an index, or _MEAN)."""
    buffer, last = [], None
    for piece in chain(pieces, [None]):
        if buffer and (piece is None or piece.shape[0] != buffer[0].shape[0] or sum(part.shape[1] for part in buffer) >= _MIX_S * rate):
            block = np.concatenate(buffer, axis=1)
            chosen = _choice(block, _MEAN if last is None else last)
            yield block, chosen if last is None or last >= len(block) else last, chosen
            buffer, last = [], chosen
        if piece is not None:
            buffer.append(piece)


def _choice(block: np.ndarray, last: int) -> int:
    """The loudest channel if it cancels out in the mean of all (the last choice while that is about as loud), else _MEAN."""
    if len(block) == 1:
        return _MEAN
    power, mean = np.square(block).mean(axis=1), block.mean(axis=0, dtype=np.float32)
    loudest = int(power.argmax())
    if power[loudest] <= _INAUDIBLE or np.square(mean).mean() >= _CANCELLED * power[loudest] / len(block) ** 2:
        return _MEAN
    return last if 0 <= last < len(block) and power[last] > power[loudest] / 4 else loudest


def _faded(before: np.ndarray, now: np.ndarray) -> np.ndarray:
    """Cross-fade from `before` to `now` over the first samples.  [..., n]"""
    if before is now:
        return now
    fade = np.linspace(1, 0, _FADE, dtype=np.float32)[: now.shape[-1]]
    return np.concatenate([now[..., :_FADE] + fade * (before[..., :_FADE] - now[..., :_FADE]), now[..., _FADE:]], axis=-1)


def _decoded(container, stream) -> Iterator[AudioFrame]:
    """Decoded frames of a stream. A packet that cannot be decoded is skipped, as players do; InvalidDataError when too many are."""
    packets = broken = 0
    fault = None
    for packet in container.demux(stream):
        packets += 1
        try:
            frames = packet.decode()
        except av.InvalidDataError as error:
            broken, fault = broken + 1, error
            continue
        yield from frames
    if broken > _DAMAGED * packets:
        raise fault


def _with_pauses(stamped: Iterator[tuple[AudioFrame, float | None]], report: ClockReport) -> Iterator[tuple[float, AudioFrame]]:
    """Pairs of the seconds of silence before a frame, according to the time stamps, and the frame."""
    ahead, past, decoded = deque(), deque(maxlen=_LOOKAHEAD), 0.0
    position = None  # seconds by which the time stamps lead the decoded sound; changes at a restart or a gap
    for new, time in chain(stamped, [(None, None)] * (_LOOKAHEAD - 1)):
        ahead.append((new, None if time is None else time - decoded))
        decoded += new.samples / new.sample_rate if new is not None else 0.0
        if len(ahead) < _LOOKAHEAD:
            continue
        leads = [lead for _, lead in ahead if lead is not None]
        frame, lead = ahead.popleft()
        gap = 0.0
        if lead is not None:
            if position is None:
                report.start_s, position = lead, _lowest(leads)
            jump = _jump(leads, past, position)
            if jump:
                position += jump
                past.clear()
            past.append(lead)
            gap = jump if 0 < jump <= LONGEST_GAP_S else 0.0
            report.silence_s += gap
            report.left_out_s += jump if jump > LONGEST_GAP_S else 0.0
        yield gap, frame


def _jump(leads: list[float], past: Sequence[float], position: float) -> float:
    """Seconds by which the time stamps jump at a frame: positive for a gap, negative for a restart, else 0.

    `leads` are those of this frame and the next ones, `past` those of the frames before it. Only a step that all of them show is a
    gap: rounded, jittering or drifting time stamps, or a single wrong one, are not.
    """
    if max(leads) < position - _RESTART_S:
        return leads[0] - position
    first_clock = list(takewhile(lambda lead: lead >= position - _RESTART_S, leads))
    if not past or not first_clock or min(first_clock) - max(past) <= SMALLEST_GAP_S:
        return 0.0
    gap = _lowest(first_clock) - position
    return gap if gap > SMALLEST_GAP_S else 0.0


def _lowest(leads: list[float]) -> float:
    """The lowest lead without rounding and jitter: the median of the leads near the minimum."""
    return float(np.median([lead for lead in leads if lead <= min(leads) + SMALLEST_GAP_S]))


def _converted(spaced: Iterator[tuple[float, AudioFrame]], rate: int, layout: str) -> Iterator[np.ndarray]:
    """Resample the frames to float32 [channels, n] at one rate and insert the silence; layout "" keeps the channels of every frame."""
    resampler, source, channels, produced, due = None, None, 1, 0, 0.0
    for silence, frame in spaced:
        kind = (frame.format.name, frame.layout.name, frame.sample_rate)
        if resampler is not None and (silence or kind != source):
            for piece in _resampled(resampler, None, layout):
                produced += piece.shape[1]
                yield piece
            resampler = None
        due += silence
        missing = round(due * rate) - produced if silence else 0
        for start in range(0, missing, rate):
            yield np.zeros((channels, min(rate, missing - start)), np.float32)
        produced += max(0, missing)
        if resampler is None:
            source, unnamed = kind, frame.layout.name.endswith("channels") and frame.layout.nb_channels > 2
            target, options = (
                (frame.layout, None) if unnamed or not layout else (layout, _MIX_OPTIONS if frame.layout.nb_channels > 2 else None)
            )
            resampler = AudioResampler(format="flt", layout=target, rate=rate, options=options)
        due += frame.samples / frame.sample_rate
        frame.pts = None  # time is counted here: a wrong time stamp must not stop the resampler
        for piece in _resampled(resampler, frame, layout):
            channels, produced = piece.shape[0], produced + piece.shape[1]
            yield piece
    if resampler is not None:
        yield from _resampled(resampler, None, layout)


def _resampled(resampler: AudioResampler, frame: AudioFrame | None, layout: str) -> Iterator[np.ndarray]:
    """Output of the resampler for a frame, or for None at the end, as float32 [channels, n].

    The resampler produces interleaved samples because PyAV cannot read eight planes. Channels without names cannot be mixed down by
    their layout: every channel of `layout` gets their mean.
    """
    for out in resampler.resample(frame):
        samples = rearrange(out.to_ndarray(), "1 (n channels) -> channels n", channels=out.layout.nb_channels)
        if layout and out.layout.nb_channels > 2:
            samples = repeat(samples.mean(axis=0), "n -> channels n", channels=AudioLayout(layout).nb_channels)
        yield samples
