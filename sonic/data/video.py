"""Video files: writing frames and speech to an MP4 as they are generated, and reading videos frame by frame."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from fractions import Fraction
from itertools import chain, repeat
from pathlib import Path

import av
import numpy as np
from av import AudioFifo, AudioLayout
from av.container import Container
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from sonic.data.audio import resample
from sonic.data.audio_decode import decode_sound, keep_audible, sound_format
from sonic.data.media import open_media
from sonic.geometry import FPS
from sonic.system.files import written_temporary
from sonic.system.heartbeat import heartbeat
from sonic.system.paths import check_name, write_target
from sonic.types import Speech

Soundtrack = Speech | Callable[[], Speech] | None  # a function is called after the last frame, and the sound is added then

_AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)
_AAC_SAMPLES = 1024  # per AAC frame
_CRF = "16"  # constant rate factor of H.264: 0 is lossless, 51 the smallest file
_SMPTE170M, _BT709, _SRGB, _TV_RANGE = 6, 1, 13, 1  # H.264 code points
_BYTES_PER_PIXEL, _BYTES_PER_SECOND, _SPARE_BYTES = 0.05, 24_000, 4 << 20  # ten times what talking heads need


def check_output(path: str | Path, width: int, height: int, *, num_frames: int, fps: float = FPS) -> Path:
    """Check that a video of this size can be written to `path`, and return the file to write: the target of a symbolic link, else `path`.

    Raises ValueError when the name does not end in .mp4, the path is something other than a file, its folder is missing or read-only,
    or the disk has too little space.
    """
    path = Path(path)
    check_name(path, "output")
    if os.path.isdir(path):
        raise ValueError(f"output={path} is a folder; give a file in it, such as {path / 'video.mp4'}")
    if path.suffix.lower() != ".mp4":
        raise ValueError(f"output={path} is not an MP4; give a name that ends in .mp4, such as {path.with_suffix('.mp4')}")
    target = write_target(path, "output")
    folder = Path(os.path.realpath(target.parent))
    if not folder.is_dir():
        raise ValueError(f"output={path}: the folder {folder} does not exist; make it first or choose another")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"output={path}: the folder {folder} cannot be written to ({error.strerror}); choose another") from error
    needed = width * height * num_frames * _BYTES_PER_PIXEL + _BYTES_PER_SECOND * num_frames / fps + _SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"output={path}: {free / 2**20:.0f} MiB are free in {folder}, {needed / 2**20:.0f} MiB may be needed; "
            "free some space or choose another folder"
        )
    return target


class VideoWriter:
    """Context manager that writes an MP4 (H.264 yuv420p, AAC, faststart) frame by frame.

    The file gets its name only when complete; after an exception or Ctrl-C nothing is left. The sound is the original recording at
    its own sample rate, read as a stream, shifted by its `later_s` to the sample and cut at the end of the frames. H.264 needs even
    sides: an odd last column or row is dropped; frames are never rescaled.
    """

    def __init__(self, path: str | Path, width: int, height: int, *, num_frames: int, speech: Soundtrack = None, fps: float = FPS) -> None:
        """num_frames is the expected length, used only to check the disk space."""
        self.path = check_output(path, width, height, num_frames=num_frames, fps=fps)
        self.width, self.height, self.frames, self.speech, self.fps = width - width % 2, height - height % 2, 0, speech, fps

    def __enter__(self) -> VideoWriter:
        with ExitStack() as files:
            last = callable(self.speech)
            path = files.enter_context(_sound_added_last(self.path, self.speech, self.fps)) if last else self.path
            self._container = files.enter_context(_written_mp4(path))
            self._video = _video_stream(self._container, self.width, self.height, fps=self.fps)
            self._sound = None if last or self.speech is None else _Sound(self._container, self.speech)
            self._reformatter = VideoReformatter()
            self._files = files.pop_all()
        return self

    def write(self, pixels: np.ndarray) -> None:
        """Append frames, uint8 [F,H,W,3]."""
        for picture in np.asarray(pixels):
            heartbeat()
            if picture.shape[0] < self.height or picture.shape[1] < self.width:
                raise ValueError(f"a frame of {picture.shape[1]}x{picture.shape[0]} does not fill a video of {self.width}x{self.height}")
            picture = np.ascontiguousarray(picture[: self.height, : self.width])
            rgb = av.VideoFrame.from_ndarray(picture, format="rgb24")
            bt601 = {"dst_colorspace": Colorspace.ITU601, "dst_color_range": ColorRange.MPEG}
            frame = self._reformatter.reformat(rgb, format="yuv420p", interpolation=Interpolation.BICUBIC, **bt601)
            frame.pts = self.frames
            self._container.mux(self._video.encode(frame))
            self.frames += 1
            if self._sound is not None:
                self._container.mux(self._sound.until(self.frames / self.fps))

    def __exit__(self, kind: type[BaseException] | None, *error) -> None:
        if kind is not None:
            self._files.__exit__(kind, *error)
            return
        with self._files:
            if self.frames == 0:
                raise ValueError(f"output={self.path}: no frame was written, so there is no video")
            self._container.mux(self._video.encode(None))
            if self._sound is not None:
                self._container.mux(self._sound.finish(self.frames / self.fps))


@contextmanager
def _written_mp4(path: Path) -> Iterator[Container]:
    """A new MP4, which gets its name when the `with` block succeeds and is removed when it fails."""
    try:
        with written_temporary(path) as partial:
            container = open_media(partial, "w", format="mp4", options={"movflags": "+faststart"})
            try:
                yield container
            except BaseException:
                with suppress(av.FFmpegError, OSError, ValueError):  # the error that led here is the one to report
                    container.close()
                raise
            container.close()
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ValueError(f"output={path}: the disk is full; free some space or choose another folder") from error
        raise


@contextmanager
def _sound_added_last(path: Path, speech: Callable[[], Speech], fps: float) -> Iterator[Path]:
    """A path for an MP4 without sound, which is copied to `path` and gets its sound when the `with` block succeeds."""
    with tempfile.TemporaryDirectory(prefix=".", suffix=".partial", dir=path.parent) as folder:
        yield (silent := Path(folder) / path.name)
        with open_media(silent) as source, _written_mp4(path) as container:
            pictures = source.streams.video[0]
            copied, sound = container.add_stream_from_template(pictures), _Sound(container, speech())
            for packet in source.demux(pictures):
                heartbeat()
                if packet.dts is not None:  # else the end of the file
                    packet.stream = copied
                    container.mux(packet)
                    container.mux(sound.until(float(packet.dts * packet.time_base)))
            container.mux(sound.finish(pictures.frames / fps))


def _video_stream(container, width: int, height: int, *, fps: float):
    stream = container.add_stream("libx264", rate=Fraction(fps))
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    # x264's mbtree reads uninitialised memory when sides are not multiples of 16: one video in a hundred had other bytes
    stream.options = {"crf": _CRF, "preset": "veryfast", "x264-params": "mbtree=0"}
    # BT.601 with its tag: players that read tags and players that assume 601 show the same colours
    context = stream.codec_context
    context.colorspace, context.color_primaries, context.color_trc, context.color_range = _SMPTE170M, _BT709, _SRGB, _TV_RANGE
    return stream


class _Sound:
    """The AAC track: encodes the recording as a stream, as far as the video has come, and silence before its start and after its end."""

    def __init__(self, container: Container, speech: Speech) -> None:
        recording, self.rate, self.layout = _recording(speech)
        channels = AudioLayout(self.layout).nb_channels
        silence = np.zeros((channels, _AAC_SAMPLES), np.float32)
        self.pieces = chain(_shifted(recording, round(speech.later_s * self.rate)), repeat(silence))
        self.waiting = AudioFifo()
        self.stream = container.add_stream("aac", rate=self.rate, layout=self.layout)
        self.stream.bit_rate = min(160_000, 4 * self.rate * channels)

    def until(self, seconds: float) -> list:
        """Packets of all whole AAC frames that end before `seconds`."""
        packets = []
        while self.waiting.samples_read + _AAC_SAMPLES <= seconds * self.rate:
            packets += self._encode(_AAC_SAMPLES)
        return packets

    def finish(self, seconds: float) -> list:
        """The remaining packets: the track ends at `seconds`."""
        packets, last = self.until(seconds), round(seconds * self.rate)
        if self.waiting.samples_read < last:
            packets += self._encode(last - self.waiting.samples_read)
        return packets + self.stream.encode(None)

    def _encode(self, samples: int) -> list:
        while self.waiting.samples < samples:
            piece = av.AudioFrame.from_ndarray(np.ascontiguousarray(next(self.pieces)), format="fltp", layout=self.layout)
            piece.sample_rate = self.rate
            self.waiting.write(piece)
        position, frame = self.waiting.samples_read, self.waiting.read(samples)
        frame.pts, frame.time_base = position, Fraction(1, self.rate)
        return self.stream.encode(frame)


def _shifted(pieces: Iterator[np.ndarray], later: int) -> Iterator[np.ndarray]:
    """The pieces of sound [channels, n] after `later` samples of silence, or without their first -`later` samples."""
    for piece in pieces:
        if later > 0:
            yield np.zeros((len(piece), later), np.float32)
        kept = piece[:, max(0, -later) :]
        later = min(0, later + piece.shape[1]) if later < 0 else 0
        if kept.size:
            yield kept


def _recording(speech: Speech) -> tuple[Iterator[np.ndarray], int, str]:
    """Pieces of the original file (own rate, stereo kept) if there is one, else the samples; their rate in Hz and channel layout."""
    own, channels = (speech.sample_rate, 1) if speech.path is None else sound_format(speech.path)
    rate = min(_AAC_RATES, key=lambda supported: abs(supported - own))
    if speech.path is None:
        return iter([(speech.samples if rate == own else resample(speech.samples, own, rate))[None]]), rate, "mono"
    layout = "mono" if channels == 1 else "stereo"
    return keep_audible(decode_sound(speech.path, rate=rate, layout=layout), rate), rate, layout


def frames_at(path: str | Path, fps: int) -> Iterator[np.ndarray]:
    """Resample a video to `fps` frames per second: the frame shown in the middle of each 1/fps s, uint8 [H,W,3]."""
    shown, count = None, 0
    for time, picture in timed_frames(path):
        while shown is not None and (count + 0.5) / fps < time:
            yield shown
            count += 1
        shown = picture
    if shown is not None:
        yield shown


def timed_frames(path: str | Path) -> Iterator[tuple[float, np.ndarray]]:
    """Pairs of the second at which a frame appears and the frame, uint8 [H,W,3]. Raises ValueError when it cannot be decoded."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"video={path} is no file; give the path of a video")
    try:
        with open_media(path) as container:
            if not container.streams.video:
                raise ValueError(f"video={path} holds no pictures; give the path of a video")
            for frame in container.decode(video=0):
                upright = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)  # phones store the rotation as metadata
                yield frame.time or 0.0, np.ascontiguousarray(upright)
    except av.FFmpegError as error:
        raise ValueError(f"video={path} cannot be decoded ({error.strerror}); give an undamaged video") from error
