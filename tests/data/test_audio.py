"""Reading of recordings, and the log-mel features."""

from __future__ import annotations

import struct
import wave
from pathlib import Path

import av
import numpy as np
import pytest
from recordings import save_speech

from sonic.data import audio
from sonic.data.audio import SILENT_COLUMN, load_soundtrack, load_speech, log_mel


def tone(seconds: float, rate: int = 16_000, level: float = 0.3) -> np.ndarray:
    """Syllables of a harmonic sound with pauses between them."""
    time = np.arange(round(seconds * rate)) / rate
    sound = sum(np.sin(2 * np.pi * 140 * k * time) / k for k in range(1, 12))
    return (level * 0.5 * sound * (np.sin(2 * np.pi * 3 * time) > -0.3)).astype(np.float32)


def write_wav(path: Path, samples: np.ndarray, rate: int = 16_000) -> Path:
    """16-bit wav of samples [n] or [n, channels]."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    return path


def write_float_wav(path: Path, samples: np.ndarray) -> Path:
    data = samples.astype("<f4").tobytes()
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 3, 1, 16_000, 64_000, 4, 32)
    path.write_bytes(
        b"RIFF" + struct.pack("<I", 28 + len(form) + len(data)) + b"WAVE" + form + struct.pack("<4sI", b"data", len(data)) + data
    )
    return path


def encode(path: Path, samples: np.ndarray, *, codec: str, rate: int) -> Path:
    """A stereo file of the given codec."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout="stereo")
        frame = av.AudioFrame.from_ndarray(np.stack([samples, samples]), format="fltp", layout="stereo")
        frame.sample_rate, frame.pts = rate, 0
        for piece in [*av.AudioResampler(format=stream.codec_context.format, layout="stereo", rate=rate).resample(frame), None]:
            container.mux(stream.encode(piece))
    return path


@pytest.mark.parametrize("rate", [8000, 16_000, 22_050, 44_100, 48_000])
def test_any_sample_rate_and_channel_count_becomes_16_khz_mono(tmp_path, rate):
    samples = tone(1.0, rate)
    for name, stored in {"mono": samples, "stereo": np.stack([samples, samples], axis=1)}.items():
        found = load_speech(write_wav(tmp_path / f"{name}.wav", stored, rate))
        assert found.sample_rate == 16_000 and found.samples.dtype == np.float32
        assert abs(len(found.samples) - 16_000) <= 2
        assert np.abs(found.samples).max() == pytest.approx(np.abs(samples).max(), rel=0.1)


@pytest.mark.parametrize(
    ("name", "codec", "rate"), [("a.mp3", "libmp3lame", 44_100), ("a.m4a", "aac", 44_100), ("a.ogg", "libopus", 48_000)]
)
def test_compressed_recordings_keep_length_and_timing(tmp_path, name, codec, rate):
    found = load_speech(encode(tmp_path / name, tone(1.5, rate), codec=codec, rate=rate)).samples
    assert abs(len(found) - 24_000) < 1200
    true, levels = (audio.frame_levels(samples)[:70] for samples in (tone(1.5), found))
    by_lag = [np.corrcoef(true[3:-3], np.roll(levels, -lag)[3:-3])[0, 1] for lag in range(-3, 4)]
    assert int(np.argmax(by_lag)) == 3


BAD = {
    "missing": (lambda folder: folder / "nowhere.wav", "does not exist"),
    "folder": (lambda folder: folder, "is a folder"),
    "empty": (lambda folder: folder / "empty.wav", "empty file"),
    "corrupt": (lambda folder: folder / "junk.mp3", "cannot be decoded"),
    "half destroyed": (lambda folder: folder / "holes.flac", "cannot be decoded"),
    "text": (lambda folder: folder / "text.wav", "cannot be decoded"),
    "header only": (lambda folder: write_wav(folder / "none.wav", np.zeros(0)), "no sound"),
    "0.05 s": (lambda folder: write_wav(folder / "short.wav", tone(0.05)), "lasts 0.05 s, the shortest recording is 0.2 s"),
    "silent": (lambda folder: write_wav(folder / "silent.wav", np.zeros(16_000)), "is silent throughout"),
    "NaN": (lambda folder: write_float_wav(folder / "nan.wav", np.where(np.arange(8000) == 4000, np.nan, tone(0.5))), "NaN"),
    "infinity": (lambda folder: write_float_wav(folder / "inf.wav", np.where(np.arange(8000) == 4000, np.inf, tone(0.5))), "NaN"),
    "picture": (lambda folder: folder / "picture.png", "is a picture"),
    "video": (lambda folder: folder / "video.mp4", "is a video"),
}


@pytest.fixture
def bad_files(tmp_path) -> Path:
    from skimage.io import imsave

    from sonic.data.video import VideoWriter

    junk = np.random.default_rng(0).bytes(40_000)
    (tmp_path / "empty.wav").touch()
    (tmp_path / "junk.mp3").write_bytes(junk)
    (tmp_path / "text.wav").write_text("hello " * 1000)
    whole = bytearray(save_speech(tmp_path / "whole.flac", 0.1 * np.random.default_rng(0).standard_normal(48_000)).read_bytes())
    whole[8_000:60_000] = junk[:1] * 52_000
    (tmp_path / "holes.flac").write_bytes(whole)
    imsave(tmp_path / "picture.png", np.zeros((8, 8, 3), np.uint8), check_contrast=False)
    with VideoWriter(tmp_path / "video.mp4", 16, 16, num_frames=2) as writer:
        writer.write(np.zeros((2, 16, 16, 3), np.uint8))
    return tmp_path


@pytest.mark.parametrize("name", BAD)
def test_a_bad_recording_gets_one_sentence_with_a_way_out(bad_files, name):
    make, sentence = BAD[name]
    with pytest.raises(ValueError, match=sentence) as caught:
        load_speech(make(bad_files))
    assert str(caught.value).startswith("audio=") and ";" in str(caught.value) and "\n" not in str(caught.value)


def test_a_cover_picture_does_not_make_a_recording_a_video(tmp_path):
    path = tmp_path / "cover.m4a"
    samples = tone(0.5, 44_100)
    with av.open(str(path), "w", format="mp4") as container:
        sound = container.add_stream("aac", rate=44_100, layout="mono")
        cover = container.add_stream("mjpeg", rate=25)
        cover.width, cover.height, cover.pix_fmt = 16, 16, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 44_100, 0
        picture = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")
        container.mux([*cover.encode(picture), *cover.encode(None), *sound.encode(frame), *sound.encode(None)])
    assert load_speech(path).seconds == pytest.approx(0.5, abs=0.05)


def save_video(path: Path, samples: np.ndarray, *, form: str, codec: str, late: float) -> Path:
    """A second of black pictures from second 0, and a sound that begins `late` seconds after them (below 0: before them)."""
    with av.open(str(path), "w", format=form, options={"avoid_negative_ts": "disabled"}) as container:
        pictures = container.add_stream("libx264", rate=25)
        pictures.width, pictures.height, pictures.pix_fmt = 16, 16, "yuv420p"
        sound = container.add_stream(codec, rate=16_000, layout="mono")
        for index in range(25):
            picture = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")
            picture.pts = index
            container.mux(pictures.encode(picture))
        frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16_000, round(16_000 * late)
        pieces = [*av.AudioResampler(format=sound.codec_context.format, layout="mono", rate=16_000).resample(frame), None]
        container.mux([*pictures.encode(None), *(packet for piece in pieces for packet in sound.encode(piece))])
    return path


@pytest.mark.parametrize(("form", "codec", "late"), [("mov", "pcm_s16le", 0.4), ("mp4", "aac", 0.4), ("mpegts", "mp3", -0.1)])
def test_a_soundtrack_that_begins_late_or_early_is_in_time_with_the_pictures(tmp_path, form, codec, late):
    samples = np.zeros(16_000, np.float32)
    samples[4800:4880] = 0.8 * np.sin(0.6 * np.arange(80))  # a click after 0.3 s of sound
    found = load_soundtrack(save_video(tmp_path / "video", samples, form=form, codec=codec, late=late))
    assert np.abs(found).argmax() / 16_000 == pytest.approx(0.3 + late, abs=0.04)
    if codec == "pcm_s16le":  # which has no padding of its own
        assert len(found) == 16_000 + 6_400 and not found[:6_400].any()
        assert np.abs(found[6_400:] - samples).max() < 1e-4


@pytest.mark.parametrize("level", [0.0, 10 ** (-70 / 20)])
def test_a_silent_recording_gives_floor_features(level):
    noise = (level * np.random.default_rng(0).standard_normal(32_000)).astype(np.float32)
    assert np.abs(log_mel(noise, 50) - SILENT_COLUMN).max() < 0.02


@pytest.mark.parametrize("decibels", [-18, -6, 6])
def test_features_hardly_depend_on_the_gain(decibels):
    samples = tone(2.0, level=0.1)
    louder = (samples * 10 ** (decibels / 20)).astype(np.float32)
    difference = np.abs(log_mel(samples, 50) - log_mel(louder, 50))
    assert difference.mean() < 0.1


def test_long_pauses_do_not_change_the_features_of_the_speech():
    samples = tone(1.0)
    padded = np.concatenate([samples, np.zeros(160_000, np.float32)])
    assert np.abs(log_mel(samples, 20) - log_mel(padded, 20)).max() < 1e-4


def test_features_do_not_depend_on_the_chunks(monkeypatch):
    samples = tone(2.0)
    whole = log_mel(samples, 55)
    monkeypatch.setattr(audio, "_CHUNK_COLUMNS", 7)
    assert np.abs(log_mel(samples, 55) - whole).max() < 1e-5


@pytest.mark.parametrize("frame", [0, 7, 31])
def test_a_click_is_encoded_in_the_middle_of_its_own_frame(frame):
    samples = np.zeros(32_000, np.float32)
    samples[frame * 640 + 318 : frame * 640 + 322] = 0.9  # (k + 1/2) / 25 s
    energy = (log_mel(samples, 50) - SILENT_COLUMN).sum(axis=1)
    before, after = energy[2 * frame], energy[2 * frame + 1]
    assert before == pytest.approx(after, rel=0.05)
    assert energy.sum() == pytest.approx(before + after, rel=0.01)


def test_frames_after_the_recording_are_silent():
    features = log_mel(tone(1.0), 60)
    assert np.all(features[2 * 27 :] == np.float32(SILENT_COLUMN))
