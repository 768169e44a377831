"""Writing and reading of MP4 files."""

from __future__ import annotations

import errno
import os
import shutil
import struct
import wave
from collections import namedtuple
from dataclasses import replace

import av
import numpy as np
import pytest
from video_files import read_frames

from sonic.data import video
from sonic.data.audio import load_speech
from sonic.data.video import VideoWriter, check_output
from sonic.types import Speech

FRAMES = 20


def smooth_frames(count: int, height: int = 32, width: int = 48) -> np.ndarray:
    """A still gradient with a bright square that moves over it."""
    y, x = np.mgrid[0:height, 0:width]
    still = np.stack([60 + 2 * x, 80 + 3 * y, 200 - x - y], axis=-1).clip(0, 255).astype(np.uint8)
    frames = np.repeat(still[None], count, axis=0)
    for k in range(count):
        frames[k, 8:16, 2 + k % 20 : 10 + k % 20] = 230
    return frames


def clicks(seconds: float, rate: int, times: list[float]) -> np.ndarray:
    samples = np.zeros(round(seconds * rate), np.float32)
    for time in times:
        samples[round(time * rate) : round(time * rate) + 40] = 0.8 * np.sin(0.6 * np.arange(40))
    return samples


@pytest.fixture
def recording(tmp_path):
    samples = clicks(FRAMES / 25, 44_100, [0.1, 0.5])
    with wave.open(str(tmp_path / "clicks.wav"), "wb") as file:
        file.setparams((2, 2, 44_100, 0, "NONE", ""))
        file.writeframes((np.stack([samples, -0.5 * samples], axis=1) * 32767).astype("<i2").tobytes())
    return load_speech(tmp_path / "clicks.wav")


def sound_of(path):
    """Samples [channels, n] of a video, its rate and the time of its first sample."""
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        frames = list(container.decode(stream))
        return np.concatenate([frame.to_ndarray() for frame in frames], axis=1), stream.rate, float(frames[0].time)


def test_frames_come_back_in_order_and_nearly_equal(tmp_path):
    frames = smooth_frames(FRAMES)
    with VideoWriter(tmp_path / "a.mp4", 48, 32, num_frames=FRAMES) as writer:
        writer.write(frames[:7])
        writer.write(frames[7:])
    found = np.stack(list(read_frames(tmp_path / "a.mp4")))
    assert found.shape == frames.shape
    assert np.abs(found.astype(int) - frames)[:, 17:].mean() < 3
    bright = [int(np.argmax(frame[12, :, 0] > 200)) for frame in found]
    assert max(abs(b - (2 + k % 20)) for k, b in enumerate(bright)) <= 1


def test_the_sound_is_the_original_in_stereo_at_its_own_rate_and_in_time(tmp_path, recording):
    with VideoWriter(tmp_path / "a.mp4", 48, 32, num_frames=FRAMES, speech=recording) as writer:
        for frame in smooth_frames(FRAMES):
            writer.write(frame[None])
    samples, rate, begin = sound_of(tmp_path / "a.mp4")
    assert rate == 44_100 and samples.shape[0] == 2
    for time in (0.1, 0.5):
        window = slice(round((time - begin - 0.05) * rate), round((time - begin + 0.05) * rate))
        assert (np.argmax(np.abs(samples[0, window])) / rate - 0.05) == pytest.approx(0, abs=0.003)


@pytest.mark.parametrize("frames", [FRAMES, FRAMES - 6])
def test_sound_and_pictures_end_within_a_frame_of_each_other(tmp_path, recording, frames):
    with VideoWriter(tmp_path / "a.mp4", 48, 32, num_frames=frames, speech=recording) as writer:
        writer.write(smooth_frames(frames))
    with av.open(str(tmp_path / "a.mp4")) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert video.frames == frames
        assert float(video.duration * video.time_base) == pytest.approx(frames / 25)
        assert float(audio.duration * audio.time_base) == pytest.approx(frames / 25, abs=0.04)


def test_speech_without_a_file_is_written_from_its_samples(tmp_path):
    with VideoWriter(tmp_path / "a.mp4", 16, 16, num_frames=10, speech=Speech(clicks(0.4, 16_000, [0.2]))) as writer:
        writer.write(np.zeros((10, 16, 16, 3), np.uint8))
    samples, rate, _ = sound_of(tmp_path / "a.mp4")
    assert rate == 16_000 and np.abs(samples).max() > 0.3


@pytest.mark.parametrize("later_s", [-0.2, -0.01234, 0.01234, 0.2])
def test_sound_is_shifted_to_the_sample_and_ends_with_the_pictures(tmp_path, recording, later_s):
    shifted = replace(recording, later_s=later_s)
    for name, speech in (("plain", recording), ("now", shifted), ("last", lambda: shifted)):
        with VideoWriter(tmp_path / f"{name}.mp4", 48, 32, num_frames=FRAMES, speech=speech) as writer:
            writer.write(smooth_frames(FRAMES))
    (plain, rate, _), (now, _, begin), (last, _, _) = (sound_of(tmp_path / f"{name}.mp4") for name in ("plain", "now", "last"))
    begin_of, most = round(0.49 * rate), round(0.21 * rate)  # of the second click
    click, near = plain[0, begin_of : begin_of + 2000], now[0, begin_of - most : begin_of + 2000 + most]
    assert np.correlate(near, click, "valid").argmax() - most == round(later_s * rate)
    assert begin == 0 and np.array_equal(now, last)
    pictures = [np.stack(list(read_frames(tmp_path / f"{name}.mp4"))) for name in ("plain", "now", "last")]
    assert all(np.array_equal(pictures[0], other) for other in pictures[1:])
    for name in ("now", "last"):
        with av.open(str(tmp_path / f"{name}.mp4")) as container:
            assert {float(stream.duration * stream.time_base) for stream in container.streams} == {FRAMES / 25}


def test_sound_that_is_added_last_lies_among_the_pictures_and_not_after_them(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (100, 64, 64, 3), np.uint8)
    with VideoWriter(tmp_path / "a.mp4", 64, 64, num_frames=100, speech=lambda: Speech(clicks(4, 16_000, [1, 3]))) as writer:
        writer.write(frames)
    with av.open(str(tmp_path / "a.mp4")) as container:
        packets = [(packet.pos, packet.stream.type, float(packet.dts * packet.time_base)) for packet in container.demux() if packet.size]
    last = {"video": 0.0, "audio": 0.0}
    for _, kind, time in sorted(packets):
        last[kind] = time
        assert abs(last["video"] - last["audio"]) < 1.5


def test_odd_sides_lose_one_row_and_one_column_and_are_not_rescaled(tmp_path):
    frames = smooth_frames(2, height=33, width=49)
    with VideoWriter(tmp_path / "a.mp4", 49, 33, num_frames=2) as writer:
        writer.write(frames)
    first = next(iter(read_frames(tmp_path / "a.mp4")))
    assert first.shape == (32, 48, 3)
    assert np.abs(first.astype(int) - frames[0, :32, :48]).mean() < 4


def test_the_index_comes_before_the_pictures(tmp_path):
    with VideoWriter(tmp_path / "a.mp4", 16, 16, num_frames=2) as writer:
        writer.write(np.zeros((2, 16, 16, 3), np.uint8))
    data = (tmp_path / "a.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


def test_the_same_frames_give_the_same_file(tmp_path, recording):
    files = []
    for name in ("a.mp4", "b.mp4"):
        with VideoWriter(tmp_path / name, 48, 32, num_frames=FRAMES, speech=recording) as writer:
            writer.write(smooth_frames(FRAMES))
        files.append((tmp_path / name).read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_video_leaves_nothing_behind(tmp_path, recording, error):
    before = set(tmp_path.iterdir())
    with pytest.raises(error), VideoWriter(tmp_path / "a.mp4", 48, 32, num_frames=FRAMES, speech=recording) as writer:
        writer.write(smooth_frames(5))
        assert not (tmp_path / "a.mp4").exists()
        raise error
    assert set(tmp_path.iterdir()) == before


def test_an_interrupted_video_keeps_the_older_one(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"older")
    with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / "a.mp4", 16, 16, num_frames=2):
        raise KeyboardInterrupt
    assert (tmp_path / "a.mp4").read_bytes() == b"older"


def test_a_video_without_frames_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="no frame was written"), VideoWriter(tmp_path / "a.mp4", 16, 16, num_frames=2):
        pass
    assert not list(tmp_path.iterdir())


class LastWriteFails:
    """A container whose last write, of the index, fails on the disk."""

    def __init__(self, container, error: int) -> None:
        self.container, self.error = container, error

    def __getattr__(self, name: str):
        return getattr(self.container, name)

    def close(self) -> None:
        self.container.close()
        raise OSError(self.error, os.strerror(self.error))


@pytest.mark.parametrize(
    ("error", "kind", "sentence"), [(errno.ENOSPC, ValueError, "the disk is full"), (errno.EIO, OSError, "Input/output error")]
)
def test_an_index_that_cannot_be_written_is_an_error_and_leaves_nothing(tmp_path, monkeypatch, error, kind, sentence):
    """The index is written when the container is closed, after the last frame."""
    opened = av.open
    monkeypatch.setattr(video.av, "open", lambda *given, **named: LastWriteFails(opened(*given, **named), error))
    with pytest.raises(kind, match=sentence), VideoWriter(tmp_path / "a.mp4", 16, 16, num_frames=2) as writer:
        writer.write(np.zeros((2, 16, 16, 3), np.uint8))
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"output=.*nowhere.* does not exist; make it first"):
        check_output(tmp_path / "nowhere" / "a.mp4", 16, 16, num_frames=1)


def test_a_folder_or_another_suffix_is_refused_as_output(tmp_path):
    with pytest.raises(ValueError, match="is a folder"):
        check_output(tmp_path, 16, 16, num_frames=1)
    with pytest.raises(ValueError, match=r"ends in \.mp4"):
        check_output(tmp_path / "a.avi", 16, 16, num_frames=1)


def test_a_read_only_folder_is_named(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("sonic.data.video.tempfile.TemporaryFile", refuse)  # a mode bit would not stop the superuser
    with pytest.raises(ValueError, match=r"cannot be written to \(Permission denied\); choose another"):
        check_output(tmp_path / "a.mp4", 16, 16, num_frames=1)


def test_a_full_disk_is_noticed_before_the_first_frame(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "total used free")(1, 1, 1 << 20))
    with pytest.raises(ValueError, match="1 MiB are free .* may be needed; free some space"):
        VideoWriter(tmp_path / "a.mp4", 720, 400, num_frames=1000)


def test_a_rotated_video_of_a_phone_is_read_upright(tmp_path):
    picture = np.zeros((32, 64, 3), np.uint8)
    picture[:, :32] = 255  # white on the left
    with VideoWriter(tmp_path / "a.mp4", 64, 32, num_frames=2) as writer:
        writer.write(np.stack([picture] * 2))
    file = bytearray((tmp_path / "a.mp4").read_bytes())
    level, turned = ([1 << 16, 0, 0, 0, 1 << 16], [0, 1 << 16, 0, -1 << 16, 0])  # of the track's matrix: by 90 degrees clockwise
    offset = file.index(struct.pack(">5i", *level), file.index(b"tkhd"))
    file[offset : offset + 20] = struct.pack(">5i", *turned)
    (tmp_path / "b.mp4").write_bytes(file)
    found = next(read_frames(tmp_path / "b.mp4"))
    assert found.shape == (64, 32, 3) and found[:32].mean() > 200 and found[32:].mean() < 50  # what was left is up now


def test_reading_a_file_that_is_no_video_is_refused(tmp_path):
    (tmp_path / "junk.mp4").write_bytes(b"junk" * 100)
    with pytest.raises(ValueError, match="cannot be decoded"):
        list(read_frames(tmp_path / "junk.mp4"))
    with pytest.raises(ValueError, match="is no file"):
        list(read_frames(tmp_path / "nowhere.mp4"))


def test_the_same_frames_give_the_same_file_whatever_the_memory_held_before(tmp_path):
    """For sides that are not multiples of 16; x264 has read uninitialised memory there."""
    rng = np.random.default_rng(0)
    still = rng.integers(0, 256, (66, 82, 3)).astype(float)
    frames = [np.clip(still + 20 * np.sin(index / 3), 0, 255).astype(np.uint8) for index in range(10)]
    files = set()
    for count in range(60):
        spoilt = np.full(1000 * (1 + count), count, np.uint8)  # what is freed here lies below the next video
        del spoilt
        with VideoWriter(tmp_path / "video.mp4", 82, 66, num_frames=10) as writer:
            writer.write(np.stack(frames))
        files.add((tmp_path / "video.mp4").read_bytes())
    assert len(files) == 1
