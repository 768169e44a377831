"""Sound of recordings and videos as float samples on the clock of the file: a pause in the time stamps becomes silence of its length,
and sample rate and channels may change on the way.

The speech that the model hears and the sound track of the video both come from here, so that they agree on the time of every sample.
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

SMALLEST_GAP_S = 0.01  # time stamps that are ahead by less have been rounded, or jitter
LONGEST_GAP_S = 600.0  # a longer jump is a fault of the clock, not a pause
_RESTART_S = 0.1  # time stamps that fall back by more have begun anew
_LOOKAHEAD = 16  # decoded frames that have to agree that the stamps jumped
_MEAN = -1  # stands for all channels where they do not cancel out
_MIX_S = 0.5  # the channels are mixed in blocks of this length
_FADE = 80  # samples over which the mix changes from one block to the next
_INAUDIBLE = 1e-8  # power of a channel that counts as silent, -80 dBFS
_CANCELLED = 0.25  # of the power that the loudest channel alone would have in the mean
_MIX_OPTIONS = {"lfe_mix_level": 1}  # FFmpeg guesses the places of channels without names: the one it calls bass may be the speaker
_DAMAGED = 0.1  # share of packets that cannot be decoded or seconds that are missing, above which a file is refused
_KEEP_CLOCK = {"matroska", "webm", "mov", "mp4", "mpegts", "mpeg", "asf", "ogg", "flv", "nut", "rm", "mxf", "wtv"}  # containers with stamps
_STATE_LENGTH = {"wav", "w64", "flac", "aiff", "au", "caf", "mov", "mp4", "tta", "ape", "wv"}  # in their header, not as an estimate


class NoSound(ValueError):
    """A video without an audio stream, or with one that holds nothing."""


@dataclass
class ClockReport:
    """What the time stamps of a file said while it was decoded, in seconds: of its first sample (None before it came), of all pauses
    that became silence, and of jumps too long for a pause, which were left out."""

    start_s: float | None = None
    silence_s: float = 0.0
    left_out_s: float = 0.0

    def sentence(self, name: str) -> str:
        """What a user should know of it; empty when the stamps have no gaps."""
        message = []
        if self.silence_s:
            message.append(f"{self.silence_s:.2f} s are missing between its time stamps and became silence of that length")
        if self.left_out_s:
            message.append(f"its time stamps jump by {self.left_out_s:.0f} s, which is too long for a pause and was left out")
        return f"{name}: {'; '.join(message)}" if message else ""


def only_sound(container, path: Path):
    """The audio stream of a file that is a recording; cover pictures are no video. Raises ValueError when there is none."""
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
    """Sample rate in Hz and channels of the first sound in a recording, as they leave the decoder."""
    with open_media(path) as container:
        frame = next(_decoded(container, only_sound(container, path)))
        return frame.sample_rate, frame.layout.nb_channels


def track_seconds(path: Path) -> float:
    """How long the sound track of a video lasts for a player, by its time stamps. Raises NoSound when there is none."""
    with open_media(path) as container:
        stream = soundtrack(container, path)
        ends = [packet.pts + (packet.duration or 0) for packet in container.demux(stream) if packet.pts is not None]
        return float((max(ends, default=0) - (stream.start_time or 0)) * stream.time_base)


def decode_sound(
    path: Path, *, rate: int, layout: str = "", choose: Callable = only_sound, report: ClockReport | None = None
) -> Iterator[np.ndarray]:
    """The sound of a file, float32 [channels, n] piece by piece, at `rate` Hz; the channels are the file's own unless `layout` names
    mono or stereo.

    `choose(container, path)` gives the stream, `report` takes what the time stamps say. Raises ValueError for a damaged file, samples
    that are not finite, and whatever `choose` refuses.
    """
    report = report or ClockReport()
    damaged = f"audio={path} cannot be decoded ({{}}); give an undamaged wav, mp3, flac, m4a or ogg file"
    attn_out = promised = 0.0
    try:
        with open_media(path) as container:
            stream = choose(container, path)
            if stream.codec_context is None:
                raise ValueError(damaged.format("its codec is unknown"))
            promised = _promised_seconds(container, stream)
            keeps_clock = _KEEP_CLOCK & set(container.format.name.split(","))
            stamped = ((frame, frame.time if keeps_clock else None) for frame in _decoded(container, stream))
            for piece in _converted(_with_pauses(stamped, report), rate, layout):
                if not np.isfinite(piece).all():
                    raise ValueError(f"audio={path} holds samples that are not numbers (NaN or infinity); save it again as 16-bit wav")
                attn_out += piece.shape[1] / rate
                yield piece
    except av.FFmpegError as error:
        raise ValueError(damaged.format(error.strerror or "unknown format")) from error
    if attn_out < (1 - _DAMAGED) * promised:
        raise ValueError(damaged.format(f"only {attn_out:.1f} of {promised:.1f} s are readable"))


def mix_down(pieces: Iterator[np.ndarray], rate: int) -> Iterator[np.ndarray]:
    """One channel of many: their mean, or where they cancel out in it the loudest of them alone.  [channels, n] -> [n]"""
    for block, last, chosen in _choices(pieces, rate):
        mean = block.mean(axis=0, dtype=np.float32)
        yield _faded(*(mean if channel == _MEAN else block[channel] for channel in (last, chosen)))


def keep_audible(pieces: Iterator[np.ndarray], rate: int) -> Iterator[np.ndarray]:
    """The channels as they are, but where they cancel out on a single loudspeaker the loudest of them on all.  [channels, n]"""
    for block, last, chosen in _choices(pieces, rate):
        yield _faded(*(block if channel == _MEAN else np.broadcast_to(block[channel], block.shape) for channel in (last, chosen)))


def _choices(pieces: Iterator[np.ndarray], rate: int) -> Iterator[tuple[np.ndarray, int, int]]:
    """The sound in blocks [channels, n], each with the channel that stands for all in the block before and in this one, or _MEAN."""
    held, last = [], None
    for piece in chain(pieces, [None]):
        if held and (piece is None or piece.shape[0] != held[0].shape[0] or sum(part.shape[1] for part in held) >= _MIX_S * rate):
            block = np.concatenate(held, axis=1)
            chosen = _choice(block, _MEAN if last is None else last)
            yield block, chosen if last is None or last >= len(block) else last, chosen
            held, last = [], chosen
        if piece is not None:
            held.append(piece)


def _choice(block: np.ndarray, last: int) -> int:
    """The loudest channel when the mean of all loses it, staying with the one before while it is about as loud; else _MEAN."""
    if len(block) == 1:
        return _MEAN
    power, mean = np.square(block).mean(axis=1), block.mean(axis=0, dtype=np.float32)
    loudest = int(power.argmax())
    if power[loudest] <= _INAUDIBLE or np.square(mean).mean() >= _CANCELLED * power[loudest] / len(block) ** 2:
        return _MEAN
    return last if 0 <= last < len(block) and power[last] > power[loudest] / 4 else loudest


def _faded(before: np.ndarray, now: np.ndarray) -> np.ndarray:
    """`now`, entered from `before` over its first samples.  [..., n]"""
    if before is now:
        return now
    fade = np.linspace(1, 0, _FADE, dtype=np.float32)[: now.shape[-1]]
    return np.concatenate([now[..., :_FADE] + fade * (before[..., :_FADE] - now[..., :_FADE]), now[..., _FADE:]], axis=-1)


def _decoded(container, stream) -> Iterator[AudioFrame]:
    """The frames of a stream. A packet that cannot be decoded is left out, as players do; InvalidDataError when they are many."""
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
    """The frames, each with the seconds of silence that the time stamps leave before it."""
    ahead, past, decoded = deque(), deque(maxlen=_LOOKAHEAD), 0.0
    position = None  # how far the stamps are ahead of the sound that was decoded; a restart or a gap changes it
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
    """Seconds by which the clock jumps at a frame: above zero a gap, below zero a restart, 0 when it goes on.

    `leads` are those of the frame and of the next ones, `past` those before it. A gap is a step that all of them agree on: stamps
    that have been rounded, jitter or drift make none, nor does one wrong stamp.
    """
    if max(leads) < position - _RESTART_S:
        return leads[0] - position
    first_clock = list(takewhile(lambda lead: lead >= position - _RESTART_S, leads))
    if not past or not first_clock or min(first_clock) - max(past) <= SMALLEST_GAP_S:
        return 0.0
    gap = _lowest(first_clock) - position
    return gap if gap > SMALLEST_GAP_S else 0.0


def _lowest(leads: list[float]) -> float:
    """The lowest of some leads, freed from rounding and jitter: the median of those near it."""
    return float(np.median([lead for lead in leads if lead <= min(leads) + SMALLEST_GAP_S]))


def _converted(spaced: Iterator[tuple[float, AudioFrame]], rate: int, layout: str) -> Iterator[np.ndarray]:
    """The frames as float32 [channels, n] at one rate, with silence where it belongs; layout "" keeps the channels of every frame."""
    resampler, source, channels, made, due = None, None, 1, 0, 0.0
    for silence, frame in spaced:
        kind = (frame.format.name, frame.layout.name, frame.sample_rate)
        if resampler is not None and (silence or kind != source):
            for piece in _resampled(resampler, None, layout):
                made += piece.shape[1]
                yield piece
            resampler = None
        due += silence
        missing = round(due * rate) - made if silence else 0
        for start in range(0, missing, rate):
            yield np.zeros((channels, min(rate, missing - start)), np.float32)
        made += max(0, missing)
        if resampler is None:
            source, unnamed = kind, frame.layout.name.endswith("channels") and frame.layout.nb_channels > 2
            target, options = (
                (frame.layout, None) if unnamed or not layout else (layout, _MIX_OPTIONS if frame.layout.nb_channels > 2 else None)
            )
            resampler = AudioResampler(format="flt", layout=target, rate=rate, options=options)
        due += frame.samples / frame.sample_rate
        frame.pts = None  # the clock is kept here: a wrong one must not stop the resampler
        for piece in _resampled(resampler, frame, layout):
            channels, made = piece.shape[0], made + piece.shape[1]
            yield piece
    if resampler is not None:
        yield from _resampled(resampler, None, layout)


def _resampled(resampler: AudioResampler, frame: AudioFrame | None, layout: str) -> Iterator[np.ndarray]:
    """What the resampler gives for a frame, or at the end for None, as float32 [channels, n].

    It gives interleaved samples: PyAV cannot read eight planes. Channels without names cannot be mixed down by their places: their
    mean stands on every channel of `layout`.
    """
    for out in resampler.resample(frame):
        samples = rearrange(out.to_ndarray(), "1 (n channels) -> channels n", channels=out.layout.nb_channels)
        if layout and out.layout.nb_channels > 2:
            samples = repeat(samples.mean(axis=0), "n -> channels n", channels=AudioLayout(layout).nb_channels)
        yield samples


def _promised_seconds(container, stream) -> float:
    """Length that the file's header states; 0 where it states none or FFmpeg only estimates it."""
    if stream.duration is None or not _STATE_LENGTH & set(container.format.name.split(",")):
        return 0.0
    return float(stream.duration * stream.time_base)
