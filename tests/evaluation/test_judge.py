"""Judging of a finished video."""

import json
import math
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from recordings import save_speech, voice
from video_files import MOUTH as MOUTH_OF
from video_files import astronaut, read_frames, talking, write

from sonic.cli import run_command
from sonic.commands import judge_command
from sonic.config import FaceLocationConfig
from sonic.data.audio import envelope, load_speech
from sonic.data.faces import portrait_of
from sonic.data.video import VideoWriter
from sonic.evaluation import metrics
from sonic.evaluation.judge import judge, measure_video, pauses, sound_fault
from sonic.evaluation.judge_config import JudgeConfig
from sonic.inference.report import mouth_window
from sonic.types import Speech

FACE = FaceLocationConfig(box=[40.0, 30.0, 60.0, 60.0], mouth=[70.0, 78.0, 12.0])
FRAMES = 75


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a photograph and a recording of varying loudness with pauses."""
    folder = tmp_path_factory.mktemp("judge")
    smooth = np.linspace(60, 180, 160)[None, :, None] + np.linspace(0, 40, 128)[:, None, None] + np.zeros(3)
    Image.fromarray(smooth.astype(np.uint8)).save(folder / "face.png")
    seconds = np.arange(FRAMES * 640) / 16000
    swell = np.clip(np.sin(2 * np.pi * 1.3 * seconds), 0, 1) * (seconds < 2.0)
    save_speech(folder / "speech.flac", (0.5 * swell * np.random.default_rng(0).standard_normal(len(seconds)) / 3).astype(np.float32))
    return folder


MOUTH = np.s_[72:90, 58:82]  # rows and columns


def write_and_configure(folder, name, motion, fps=25, where=MOUTH):
    """A config for a video of the photograph whose mouth (or another part) is brighter by motion[k] grey levels in frame k."""
    photo = np.array(Image.open(folder / "face.png"))
    with VideoWriter(folder / name, 160, 128, num_frames=len(motion), fps=fps) as writer:
        for strength in motion:
            frame = photo.astype(np.float32)
            frame[where] += strength
            writer.write(frame.clip(0, 255).astype(np.uint8)[None])
    return JudgeConfig(
        mp4=str(folder / name), image=str(folder / "face.png"), audio=str(folder / "speech.flac"), json=str(folder / "out.json"), face=FACE
    )


def sound(folder, frames=FRAMES, fps=25):
    return envelope(load_speech(folder / "speech.flac").samples, 16000, frames, fps=fps)


@pytest.mark.parametrize("late", [0, 4])
def test_the_lag_of_the_mouth_is_found(folder, late):
    motion = np.roll(200 * sound(folder), late)
    found = judge(write_and_configure(folder, f"late{late}.mp4", motion))
    assert found["speech_correlation"] > 0.9
    assert abs(found["lag_frames"] - late) < 0.6
    assert json.loads((folder / "out.json").read_text())["lag_frames"] == found["lag_frames"]


def test_a_video_of_another_rate_is_compared_with_the_sound_of_its_own_frames(folder):
    found = judge(write_and_configure(folder, "slow.mp4", 200 * sound(folder, 48, 16), fps=16))
    assert found["speech_correlation"] > 0.9
    assert abs(found["lag_frames"]) < 0.6


def test_a_video_of_another_size_is_compared_with_the_photograph_at_that_size(folder):
    config = write_and_configure(folder, "large.mp4", np.zeros(FRAMES))
    large = np.array(Image.open(folder / "face.png").resize((480, 384), Image.Resampling.BICUBIC))
    with VideoWriter(folder / "large.mp4", 480, 384, num_frames=FRAMES) as writer:
        writer.write(np.broadcast_to(large, (FRAMES, *large.shape)))
    with pytest.raises(ValueError, match="480x384"):
        judge(config)
    assert judge(replace(config, min_resolution=384))["photo_psnr_db"] > 35


def test_a_mouth_that_does_not_follow_the_speech_scores_low(folder):
    motion = 40 * np.random.default_rng(1).random(FRAMES)
    found = judge(write_and_configure(folder, "noise.mp4", motion))
    assert found["speech_correlation"] < 0.5
    assert found["rest_ratio"] > 0.5


def test_the_mouth_itself_does_not_count_as_damage_to_the_photograph(folder):
    still, moving = (
        judge(write_and_configure(folder, name, level * np.ones(FRAMES)))["photo_psnr_db"] for name, level in (("a.mp4", 0), ("b.mp4", 60))
    )
    assert still > 38 and moving > 36


@pytest.mark.parametrize("angle", [0.0, math.pi])
def test_the_lips_of_a_real_face_are_read_as_they_move(tmp_path, angle):
    """The true opening, the landmarks' reading and the change of the pixels, which knows nothing of landmarks, agree."""
    visemes = torch.zeros(24, 5)
    visemes[:, 0] = torch.linspace(0, 3 * math.pi, 24).sin() ** 2
    turned = (lambda pixels: pixels[:, ::-1, ::-1].copy()) if angle else np.array
    write(tmp_path / "talks.mp4", turned(talking(visemes)), None)
    x, y = (260 - MOUTH_OF.x, 260 - MOUTH_OF.y) if angle else (MOUTH_OF.x, MOUTH_OF.y)
    box = [80, 80, 90, 90] if angle else [90, 90, 90, 90]
    portrait = portrait_of(turned(astronaut()[None])[0], box, [x, y, MOUTH_OF.unit, MOUTH_OF.roll + angle])
    motion, _, _ = measure_video(tmp_path / "talks.mp4", portrait)
    pixels = [np.abs(frame.astype(float) - portrait.pixels)[mouth_window(portrait)].mean() for frame in read_frames(tmp_path / "talks.mp4")]
    assert metrics.correlation(motion, visemes[:, 0].numpy()) > 0.95 and metrics.correlation(motion, np.array(pixels)) > 0.8
    assert motion.max() > 0.05 and abs(motion[0]) < 0.03  # in distances of the eyes, from rest


def test_damage_counts_by_its_mean_square_over_all_frames(folder):
    motion = np.where(np.arange(FRAMES) < FRAMES // 3, 20, 0)  # of the first third of the video
    found = judge(write_and_configure(folder, "damaged.mp4", motion, where=np.s_[:, :]))
    assert found["photo_psnr_db"] == pytest.approx(10 * np.log10(255**2 / (20**2 / 3)), abs=0.3)


@pytest.mark.parametrize(("rows", "counts"), [(np.s_[34:52], True), (np.s_[93:111], False), (np.s_[119:127], True)])
def test_the_chin_may_move_and_forehead_and_chest_may_not(folder, rows, counts):
    """The chin of this face is at row 90; an open jaw and its shadow extend below it."""
    found = judge(write_and_configure(folder, "part.mp4", np.full(FRAMES, 60), where=(rows, np.s_[58:82])))
    assert (found["photo_psnr_db"] < 33) is counts


def test_the_rest_ratio_is_the_motion_in_long_pauses_against_that_in_loud_frames(folder):
    """Motion in the short gaps between words counts for neither."""
    level, after = sound(folder), np.arange(FRAMES) > 47 + 5  # the last word ends in frame 47
    motion = np.where(after, 20, np.where(level > np.median(level), 80, 50))
    assert judge(write_and_configure(folder, "rest.mp4", motion))["rest_ratio"] == pytest.approx(20 / 80, rel=0.03)


def test_frames_of_a_pause_are_far_from_every_sound():
    level = np.ones(60)
    level[20:40] = 1e-6
    assert pauses(level, 25).nonzero()[0].tolist() == list(range(25, 35))
    assert pauses(level.repeat(2), 50).nonzero()[0].tolist() == list(range(50, 70))


def test_a_video_of_another_size_is_refused(folder):
    config = write_and_configure(folder, "c.mp4", np.zeros(FRAMES))
    config.size = "100x80"
    with pytest.raises(ValueError, match="size"):
        judge(config)


@pytest.mark.parametrize("option", ["mp4", "image", "audio"])
def test_the_figures_never_overwrite_a_judged_file(tmp_path, option):
    for name in ("mp4", "image", "audio"):
        (tmp_path / name).write_text(name)
    (tmp_path / "again").hardlink_to(tmp_path / option)
    named = {name: str(tmp_path / name) for name in ("mp4", "image", "audio")}
    with pytest.raises(ValueError, match=f"^json=.* is the file {option}=.* that is judged; choose another json"):
        judge(JudgeConfig(**named, json=str(tmp_path / "again")))
    assert (tmp_path / option).read_text() == option


def voiced(folder, name, samples, frames=FRAMES):
    """A config for a video with these samples as sound track."""
    with VideoWriter(folder / name, 160, 128, num_frames=frames, speech=None if samples is None else Speech(samples)) as writer:
        writer.write(np.repeat(np.array(Image.open(folder / "face.png"))[None], frames, axis=0))
    return JudgeConfig(mp4=str(folder / name), image=str(folder / "face.png"), audio=str(folder / "speech.flac"), face=FACE)


def spoken(folder):
    """A speech-like recording in the folder."""
    save_speech(folder / "speech.flac", voice(FRAMES / 25))
    return load_speech(folder / "speech.flac").samples


def cut_short(folder, name, keep):
    """A copy of the video with only the first packets of its sound track."""
    short = folder / f"short_{name}"
    with av.open(str(folder / name)) as given, av.open(str(short), "w") as made:
        streams = {stream.index: made.add_stream_from_template(stream) for stream in given.streams}
        for count, packet in enumerate(each for each in given.demux() if each.dts is not None):
            sound = packet.stream.type == "audio"
            packet.stream = streams[packet.stream.index]
            if not sound or count < keep:
                made.mux(packet)
    return short


FAULTS = {
    "the recording": (lambda samples: samples, ""),
    "quieter and upside down": (lambda samples: -0.2 * samples, ""),
    "40 ms late": (lambda samples: np.pad(samples, (640, 0)), "is 40.0, allowed are ±10; post.alignment_offset or"),
    "a second early": (lambda samples: samples[16_000:], "sound_offset_ms is -1000.0"),
    "its second half 50 ms late": (lambda samples: np.concatenate([samples[:24_000], np.zeros(800, "f"), samples[24_000:]]), "correlation"),
    "another sound": (lambda samples: samples[::-1].copy(), "sound_correlation is"),
    "nothing": (lambda samples: np.zeros_like(samples), "sound_correlation is 0.00"),
    "no track": (lambda samples: None, "no sound track: sound_length_ms is -3000.0"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_video_fails_unless_its_own_sound_is_the_recording_in_time(tmp_path, folder, case):
    Image.open(folder / "face.png").save(tmp_path / "face.png")
    change, sentence = FAULTS[case]
    found = judge(voiced(tmp_path, "a.mp4", change(spoken(tmp_path))))
    fault = sound_fault(found)
    assert sentence in fault if sentence else fault == ""
    assert ("post.lip_align" in fault) == (case == "40 ms late")
    if not sentence:
        assert abs(found["sound_offset_ms"]) < 1 and abs(found["sound_length_ms"]) < 1 and found["sound_correlation"] > 0.95


def test_a_sound_track_that_ends_early_is_reported_by_its_length(tmp_path, folder):
    Image.open(folder / "face.png").save(tmp_path / "face.png")
    config = voiced(tmp_path, "a.mp4", spoken(tmp_path))
    config.mp4 = str(cut_short(tmp_path, "a.mp4", keep=80))
    assert "sound_length_ms is -" in sound_fault(judge(config))


@pytest.mark.parametrize(("sound", "code"), [(True, 0), (False, 1)])
def test_the_command_reports_wrong_sound_in_one_sentence(tmp_path, folder, monkeypatch, capsys, sound, code):
    Image.open(folder / "face.png").save(tmp_path / "face.png")
    samples = spoken(tmp_path)
    voiced(tmp_path, "12:30.mp4", samples if sound else None)
    monkeypatch.chdir(tmp_path)
    argv = ["mp4=12:30.mp4", "image=face.png", "audio=speech.flac", "face.box=[40,30,60,60]", "face.mouth=[70,78,12]", "json=out.json"]
    assert run_command(judge_command.ENTRY, judge_command.score, argv) == code
    message = capsys.readouterr()
    assert "sound_length_ms" in message.out and "sound_correlation" in json.loads(Path("out.json").read_text())
    sentences = [line for line in message.err.splitlines() if "error" in line]
    assert len(sentences) == code and all("mp4=12:30.mp4: the video has no sound track" in line for line in sentences)
