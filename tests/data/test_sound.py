"""The sound of videos: for every kind of recording it is as long as the pictures, in time, and equal to the model's input."""

from __future__ import annotations

import logging
import os
import shutil

import av
import numpy as np
import pytest
from recordings import RATE, encode, offset_ms, plain_decode, restamp, speech_and_video_sound, video_of, voice

from sonic.data.audio import NoSound, load_soundtrack, load_speech
from sonic.data.video import VideoWriter

SECONDS = 2.0
KINDS = {  # suffix, codec, Hz, channels, options of the container, whether the file states its encoder delay
    "wav": ("wav", "pcm_s16le", 44_100, 2, {}, True),
    "wav of bytes": ("wav", "pcm_u8", 8000, 1, {}, True),
    "wav of 24 bits": ("wav", "pcm_s24le", 48_000, 2, {}, True),
    "wav of doubles": ("wav", "pcm_f64le", 16_000, 1, {}, True),
    "wav of A-law": ("wav", "pcm_alaw", 8000, 1, {}, True),
    "RF64": ("wav", "pcm_s16le", 48_000, 2, {"rf64": "always"}, True),
    "192 kHz": ("flac", "flac", 192_000, 1, {}, True),
    "aiff": ("aiff", "pcm_s16be", 22_050, 1, {}, True),
    "au": ("au", "pcm_s16be", 16_000, 1, {}, True),
    "caf": ("caf", "pcm_s16le", 44_100, 1, {}, True),
    "tta": ("tta", "tta", 44_100, 1, {}, True),
    "wavpack": ("wv", "wavpack", 44_100, 1, {}, True),
    "mp3": ("mp3", "libmp3lame", 44_100, 2, {}, True),
    "mp3 of 8 kHz": ("mp3", "libmp3lame", 8000, 1, {}, True),
    "mp3 without Xing header": ("mp3", "libmp3lame", 44_100, 1, {"write_xing": "0"}, False),
    "mp2": ("mp2", "mp2", 44_100, 1, {}, False),
    "m4a": ("m4a", "aac", 44_100, 2, {}, True),
    "mov": ("mov", "aac", 48_000, 1, {}, True),
    "alac": ("m4a", "alac", 44_100, 1, {}, True),
    "fragmented mp4": ("mp4", "aac", 48_000, 1, {"movflags": "frag_keyframe+empty_moov"}, False),
    "opus in mp4": ("mp4", "libopus", 48_000, 1, {}, True),
    "adts": ("aac", "aac", 16_000, 1, {}, False),
    "ac3": ("ac3", "ac3", 48_000, 2, {}, False),
    "transport stream": ("ts", "aac", 44_100, 1, {}, False),
    "ac3 in a transport stream": ("ts", "ac3", 48_000, 1, {}, False),
    "webm": ("webm", "libopus", 48_000, 1, {}, True),
    "ogg": ("ogg", "libopus", 48_000, 2, {}, True),
    "flac in ogg": ("ogg", "flac", 16_000, 1, {}, True),
    "aac in mka": ("mka", "aac", 44_100, 1, {}, False),
    "mp3 in mka": ("mka", "libmp3lame", 44_100, 1, {}, False),
    "pcm in mka": ("mka", "pcm_s16le", 8000, 1, {}, True),
    "wma": ("wma", "wmav2", 44_100, 2, {}, False),
    "mp3 in avi": ("avi", "libmp3lame", 44_100, 1, {}, False),
    "flv": ("flv", "aac", 44_100, 1, {}, False),
    "amr": ("3gp", "libopencore_amrnb", 8000, 1, {}, False),
}
CLOCKS = {  # change of the time stamp of 20 ms packet k: seconds to add, or None to drop it; expected silences as (second, length)
    "pause": (lambda k: 1.0 if k >= 50 else 0.0, [(1.0, 1.0)]),
    "two pauses": (lambda k: 0.8 if k >= 80 else 0.3 if k >= 40 else 0.0, [(0.8, 0.3), (1.9, 0.5)]),
    "lost packet": (lambda k: None if k == 50 else 0.0, [(1.0, 0.02)]),
    "jitter": (lambda k: 0.001 * (k * 7 % 11 - 5) + 0.1, []),
    "jitter and a pause": (lambda k: 0.001 * (k * 7 % 11 - 5) + (1.1 if k >= 50 else 0.1), [(1.0, 1.0)]),
    "drift": (lambda k: 0.0004 * k, []),
    "one wrong stamp": (lambda k: 2.7 if k == 50 else 2.0, []),
    "one stamp too early": (lambda k: 1.3 if k == 50 else 2.0, []),
    "a clock that begins anew": (lambda k: 2.0 - 0.02 * 50 if k >= 50 else 2.0, []),
    "a late start": (lambda k: 3.3, []),
}
MANY_CHANNELS = [
    ("wav", "pcm_s16le", "8 channels"),
    ("wav", "pcm_f32le", "12 channels"),
    ("m4a", "aac", "7.1"),
    ("mka", "flac", "7.1"),
    ("wav", "pcm_s16le", "5.1"),
]


def channels_of(samples: np.ndarray, count: int) -> np.ndarray:
    return np.stack([samples * level for level in (1.0, 0.6)][:count])


@pytest.mark.parametrize("kind", KINDS)
def test_the_sound_of_every_kind_is_as_long_as_the_video_and_in_time(tmp_path, kind):
    suffix, codec, rate, channels, options, says_delay = KINDS[kind]
    path = encode(tmp_path / f"a.{suffix}", channels_of(voice(SECONDS, rate), channels), codec, rate=rate, options=options)
    speech, video = speech_and_video_sound(path, tmp_path)
    references = [plain_decode(path), speech.samples, *([voice(SECONDS)] if says_delay else [])]
    for reference in references:
        late, correlation = offset_ms(video, reference)
        assert abs(late) < 10 and correlation > 0.9
    assert speech.seconds == pytest.approx(SECONDS, abs=0.15)


@pytest.mark.parametrize("clock", CLOCKS)
def test_a_gap_in_the_time_stamps_becomes_silence_of_its_length_and_nothing_else_does(tmp_path, caplog, clock):
    change, silences = CLOCKS[clock]
    source = encode(tmp_path / "whole.webm", voice(SECONDS, 48_000)[None], "libopus", rate=48_000)
    with caplog.at_level(logging.WARNING):
        speech, video = speech_and_video_sound(restamp(source, tmp_path / "a.mka", change), tmp_path)
    kept, truth = plain_decode(source), []
    first = 0
    for second, length in silences:
        cut = round((second - sum(other for before, other in silences if before < second)) * RATE)
        lost = round(length * RATE) if clock == "lost packet" else 0
        truth += [kept[first:cut], np.zeros(round(length * RATE), np.float32)]
        first = cut + lost
    truth = np.concatenate([*truth, kept[first:]])
    assert speech.seconds == pytest.approx(len(truth) / RATE, abs=0.005)
    for found in (speech.samples, video):
        for part in (slice(0, round(0.7 * RATE)), slice(round(-0.7 * RATE) + len(truth), len(truth))):
            late, correlation = offset_ms(found[part], truth[part])
            assert abs(late) < 2 and correlation > 0.9
    sentences = [record.getMessage() for record in caplog.records]
    total = sum(length for _, length in silences)
    assert len(sentences) == (1 if silences else 0)
    assert all(f"a.mka: {total:.2f} s are missing" in sentence for sentence in sentences)


@pytest.mark.parametrize(("suffix", "codec"), [("m4a", "aac"), ("ts", "aac"), ("ogg", "libopus"), ("wma", "wmav2")])
def test_every_container_with_a_clock_shows_its_pauses(tmp_path, suffix, codec):
    source = encode(tmp_path / f"whole.{suffix}", voice(3.0, 48_000)[None], codec, rate=48_000)
    speech, video = speech_and_video_sound(restamp(source, tmp_path / f"a.{suffix}", lambda k: 1.0 if k >= 60 else 0.0), tmp_path)
    assert speech.seconds == pytest.approx(len(plain_decode(source)) / RATE + 1, abs=0.03)
    quiet = np.abs(video[: len(video) // 160 * 160]).reshape(-1, 160).max(axis=1) < 3e-3
    assert 95 <= quiet.sum() <= 105
    assert offset_ms(video, speech.samples)[1] > 0.9


def test_a_jump_of_hours_in_the_time_stamps_adds_no_silence(tmp_path, caplog):
    source = encode(tmp_path / "whole.webm", voice(SECONDS, 48_000)[None], "libopus", rate=48_000)
    speech = load_speech(restamp(source, tmp_path / "a.mka", lambda k: 7200.0 if k >= 50 else 0.0))
    assert speech.seconds == pytest.approx(SECONDS, abs=0.01)
    assert "jump by 7200 s" in caplog.text


def test_a_recording_may_change_rate_and_channels_on_the_way(tmp_path):
    first = encode(tmp_path / "a.mp3", channels_of(voice(1.0, 44_100), 2), "libmp3lame", rate=44_100)
    second = encode(tmp_path / "b.mp3", voice(1.0, 24_000, seed=1)[None], "libmp3lame", rate=24_000)
    both = tmp_path / "both.mp3"
    both.write_bytes(first.read_bytes() + second.read_bytes())
    speech, video = speech_and_video_sound(both, tmp_path)
    assert speech.seconds == pytest.approx(2.05, abs=0.1)
    assert offset_ms(video, speech.samples) == (pytest.approx(0, abs=1), pytest.approx(1, abs=0.05))
    assert abs(offset_ms(video, 0.8 * voice(1.0))[0]) < 10
    assert abs(offset_ms(video, voice(1.0, seed=1))[0] - 1000) < 80  # includes the delay of the second encoder


@pytest.mark.parametrize("frames", [1, 40, 10_000])
def test_a_wrong_number_of_frames_in_the_xing_header_does_not_matter(tmp_path, frames):
    path = encode(tmp_path / "a.mp3", voice(SECONDS, 44_100)[None], "libmp3lame", rate=44_100)
    data = bytearray(path.read_bytes())
    header = max(data.find(b"Xing"), data.find(b"Info"))
    data[header + 8 : header + 12] = frames.to_bytes(4, "big")
    path.write_bytes(data)
    speech, video = speech_and_video_sound(path, tmp_path)
    assert speech.seconds == pytest.approx(SECONDS, abs=0.06)
    assert abs(offset_ms(video, speech.samples)[0]) < 1


def test_bytes_after_the_last_frame_of_an_mp3_are_ignored(tmp_path):
    path = encode(tmp_path / "a.mp3", voice(SECONDS, 44_100)[None], "libmp3lame", rate=44_100)
    path.write_bytes(path.read_bytes() + np.random.default_rng(0).bytes(3000))
    assert load_speech(path).seconds == pytest.approx(SECONDS, abs=0.06)


@pytest.mark.parametrize(("suffix", "codec", "layout"), MANY_CHANNELS)
@pytest.mark.parametrize("speaker", [2, -1])
def test_a_speaker_on_any_of_many_channels_is_encoded(tmp_path, suffix, codec, layout, speaker):
    channels = np.zeros((av.AudioLayout(layout).nb_channels, round(SECONDS * 16_000)), np.float32)
    channels[speaker] = 2 * voice(SECONDS)
    speech, video = speech_and_video_sound(encode(tmp_path / f"a.{suffix}", channels, codec, rate=16_000, layout=layout), tmp_path)
    for found in (speech.samples, video):
        late, correlation = offset_ms(found, voice(SECONDS))
        assert abs(late) < 10 and correlation > 0.9
        assert np.abs(found).max() > 0.02


@pytest.mark.parametrize(("first", "second"), [(-1.0, -1.0), (-0.9, -0.9), (1.0, -1.0)])
def test_channels_out_of_phase_are_encoded_on_one_loudspeaker(tmp_path, first, second):
    samples = voice(SECONDS)
    half = len(samples) // 2
    right = np.concatenate([first * samples[:half], second * samples[half:]])
    speech, video = speech_and_video_sound(encode(tmp_path / "a.wav", np.stack([samples, right]), "pcm_s16le", rate=RATE), tmp_path)
    for found in (speech.samples, video):
        assert offset_ms(found, samples) == (pytest.approx(0, abs=1), pytest.approx(1, abs=0.02))
        assert np.abs(found).max() > 0.9 * np.abs(samples).max()


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [16_000, 44_100, 48_000])
@pytest.mark.parametrize(("suffix", "codec"), [("wav", "pcm_s16le"), ("flac", "flac")])
def test_ordinary_recordings_are_the_mean_of_the_resampled_channels_to_the_bit(tmp_path, suffix, codec, rate, channels):
    path = encode(tmp_path / f"a.{suffix}", channels_of(voice(1.3, rate), channels), codec, rate=rate)
    layout = {1: "mono", 2: "stereo"}[channels]
    with av.open(str(path)) as container:
        resampler, frames = av.AudioResampler("fltp", layout, RATE), []
        for frame in container.decode(audio=0):
            frame.pts = None
            frames += resampler.resample(frame)
        frames += resampler.resample(None)
    truth = np.concatenate([frame.to_ndarray().mean(axis=0, dtype=np.float32) for frame in frames])
    assert np.array_equal(load_speech(path).samples, truth)


def test_a_video_longer_than_its_recording_is_silent_to_its_end(tmp_path):
    speech = load_speech(encode(tmp_path / "a.mp3", voice(1.0, 44_100)[None], "libmp3lame", rate=44_100))
    pictures, sound = video_of(speech, tmp_path / "video.mp4", frames=60)
    assert pictures == pytest.approx(2.4) and sound == pytest.approx(2.4, abs=0.001)
    assert not plain_decode(tmp_path / "video.mp4")[round(1.1 * RATE) :].round(3).any()


@pytest.mark.parametrize("name", ["12:30", "a%03d", "http:x", os.fsdecode(b"caf\xe9"), "'quoted' and spaced"])
def test_recordings_and_videos_may_have_any_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    recording = f"{name}.mp3"
    shutil.copy(encode(tmp_path / "a.mp3", voice(1.0, 44_100)[None], "libmp3lame", rate=44_100), tmp_path / recording)
    video_of(load_speech(recording), tmp_path / f"{name}.mp4")
    assert {path.name for path in tmp_path.iterdir()} == {"a.mp3", recording, f"{name}.mp4"}
    assert abs(offset_ms(load_soundtrack(tmp_path / f"{name}.mp4"), voice(1.0))[0]) < 10


def test_tags_in_any_encoding_do_not_stop_a_recording(tmp_path):
    path = encode(tmp_path / "a.wav", voice(1.0)[None], "pcm_s16le", rate=RATE)
    tag = b"LIST" + (16).to_bytes(4, "little") + b"INFOINAM" + (4).to_bytes(4, "little") + b"caf\xe9"
    path.write_bytes(path.read_bytes() + tag)
    assert load_speech(path).seconds == pytest.approx(1.0)


def test_a_long_recording_is_never_held_as_a_whole(tmp_path):
    speech = load_speech(encode(tmp_path / "a.mp3", channels_of(voice(30.0, 44_100), 2), "libmp3lame", rate=44_100))
    with VideoWriter(tmp_path / "video.mp4", 16, 16, num_frames=750, speech=speech) as writer:
        most = 0
        for _ in range(750):
            writer.write(np.zeros((1, 16, 16, 3), np.uint8))
            most = max(most, writer._sound.waiting.samples)
    assert most < 2 * 44_100


def own_video(path, channels: np.ndarray, *, layout: str, late_s: float = 0.0):
    """A video whose sound begins `late_s` after its pictures."""
    with av.open(str(path), "w") as container:
        pictures, sound = container.add_stream("mpeg4", rate=25), container.add_stream("flac", rate=RATE, layout=layout)
        pictures.width = pictures.height = 16
        for _ in range(25):
            container.mux(pictures.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")))
        samples = (np.ascontiguousarray(channels.T).reshape(1, -1) * 32767).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout=layout)
        frame.sample_rate, frame.pts = RATE, round(late_s * RATE)
        container.mux([*sound.encode(frame), *pictures.encode(None), *sound.encode(None)])
    return path


@pytest.mark.parametrize("late_s", [0.0, 0.4])
def test_the_sound_of_an_own_video_is_in_time_with_its_pictures(tmp_path, late_s):
    channels = np.stack([voice(1.0)] * 8)
    found = load_soundtrack(own_video(tmp_path / "a.mkv", channels, layout="7.1", late_s=late_s))
    late, correlation = offset_ms(found, voice(1.0))
    assert late == pytest.approx(1000 * late_s, abs=2) and correlation > 0.99


def test_a_video_without_sound_says_so(tmp_path):
    with VideoWriter(tmp_path / "a.mp4", 16, 16, num_frames=2) as writer:
        writer.write(np.zeros((2, 16, 16, 3), np.uint8))
    with pytest.raises(NoSound, match="has no sound in it"):
        load_soundtrack(tmp_path / "a.mp4")
