"""Recordings of every kind for tests, made with PyAV, and measurement of the sound of videos independent of the tested code."""

from __future__ import annotations

import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from sonic.data.audio import load_speech
from sonic.data.video import VideoWriter
from sonic.geometry import frames_of_audio
from sonic.types import Speech

RATE = 16_000


def voice(seconds: float, rate: int = RATE, seed: int = 0) -> np.ndarray:
    """Speech-like sound without repetition: syllables of harmonics with a wandering pitch, float32 [n]."""
    rng = np.random.default_rng(seed)
    knots = np.arange(0, seconds + 0.2, 0.1)
    time = np.arange(round(seconds * rate)) / rate
    pitch = np.interp(time, knots, rng.uniform(90, 210, len(knots)))
    loud = np.interp(time, knots, rng.uniform(0.1, 1, len(knots)))
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    return (0.12 * loud * sum(np.sin(k * phase) / k for k in range(1, 12))).astype(np.float32)


def save_speech(path: Path, samples: np.ndarray) -> Path:
    """Write 16 kHz mono samples as 16-bit FLAC."""
    return encode(path, np.clip(samples, -1, 1)[None].astype(np.float32), "flac", rate=RATE)


def encode(path: Path, channels: np.ndarray, codec: str, *, rate: int, layout: str = "", options: dict | None = None) -> Path:
    """Write samples [channels, n] to a file whose container is that of the suffix."""
    layout = layout or {1: "mono", 2: "stereo"}[len(channels)]
    with av.open("file:" + os.path.abspath(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        packed = np.ascontiguousarray(channels.T).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(packed, format="flt", layout=layout)
        frame.sample_rate, frame.pts = rate, 0
        if codec == "wmav2":
            stream.bit_rate = 64_000
        size = stream.codec_context.frame_size or None
        resampler, position = av.AudioResampler(stream.codec_context.format, layout, rate, frame_size=size), 0
        for piece in [*resampler.resample(frame), *resampler.resample(None)]:
            piece.pts, piece.time_base = position, Fraction(1, rate)
            position += piece.samples
            container.mux(stream.encode(piece))
        container.mux(stream.encode(None))
    return path


def restamp(source: Path, path: Path, seconds: Callable[[int], float | None]) -> Path:
    """Copy the packets of a file with seconds(k) added to the time stamps of the k-th; None drops the packet."""
    with av.open(str(source)) as given, av.open(str(path), "w") as made:
        stream = made.add_stream_from_template(given.streams.audio[0])
        late = {count: seconds(count) for count in range(10_000)}
        packets = [each for count, each in enumerate(given.demux(audio=0)) if each.dts is not None and late[count] is not None]
        kept = [value for value in late.values() if value is not None]
        for packet, value in zip(packets, kept, strict=False):
            packet.pts += round(value / packet.time_base)
        order = np.minimum.accumulate([packet.pts for packet in packets][::-1])[::-1]  # no dts may be later than a pts that follows
        for packet, dts in zip(packets, order.tolist(), strict=True):
            packet.dts, packet.stream = dts, stream
            made.mux(packet)
    return path


def plain_decode(path: Path) -> np.ndarray:
    """Decode the first sound of a file as 16 kHz mono, frame by frame, ignoring the time stamps."""
    found, resampler = [], av.AudioResampler("flt", "mono", RATE)
    with av.open("file:" + os.path.abspath(path)) as container:
        for frame in container.decode(audio=0):
            frame.pts = None
            found += resampler.resample(frame)
    return np.concatenate([frame.to_ndarray()[0] for frame in [*found, *resampler.resample(None)]])


def video_of(speech: Speech, path: Path, frames: int = 0) -> tuple[float, float]:
    """Write a video of a recording; gives the durations of its pictures and of its sound track in seconds."""
    frames = frames or frames_of_audio(len(speech.samples), speech.sample_rate, 25)
    with VideoWriter(path, 16, 16, num_frames=frames, speech=speech) as writer:
        for _ in range(frames):
            writer.write(np.zeros((1, 16, 16, 3), np.uint8))
    with av.open("file:" + os.path.abspath(path)) as container:
        assert container.streams.audio[0].start_time == 0
        return tuple(float(stream.duration * stream.time_base) for stream in (container.streams.video[0], container.streams.audio[0]))


def offset_ms(found: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Delay of `found` behind `truth` in ms, and the correlation of the two at that delay."""
    size = len(found) + len(truth)
    products = np.fft.irfft(np.fft.rfft(found, size) * np.fft.rfft(truth, size).conj(), size)
    best = int(products.argmax())
    late = best if best < len(found) else best - size
    return 1000 * late / RATE, float(products[best] / np.sqrt((found @ found) * (truth @ truth)))


def speech_and_video_sound(path: Path, folder: Path) -> tuple[Speech, np.ndarray]:
    """A recording as the model's input, and the decoded sound of its video, after checking the durations."""
    speech = load_speech(path)
    pictures, sound = video_of(speech, folder / "video.mp4")
    assert abs(pictures - speech.seconds) <= 0.04
    assert abs(sound - pictures) <= 0.04
    return speech, plain_decode(folder / "video.mp4")
