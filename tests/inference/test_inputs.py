"""Inputs of a video: position of the face, several speakers with a mask each, and a video of poses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from infer_command import babble, write_wav
from PIL import Image, ImageDraw
from tiny import conditions, tiny_model
from torch.testing import assert_close

from sonic.cli import Entry, compose
from sonic.data.video import VideoWriter, frames_at
from sonic.families.wan import _audio_weights, _moved_further
from sonic.inference.infer_config import InferConfig
from sonic.inference.input_reader import open_inputs

HALVES = ("left", "right")
MODELS = ("preview", "live_avatar_14b", "wan_s2v_14b")


@pytest.fixture
def inputs(tmp_path):
    for index, (name, seconds) in enumerate(zip(HALVES, (0.5, 1.0), strict=True)):
        write_wav(tmp_path / f"{name}.wav", babble(seconds, seed=index))
        half = np.zeros((192, 256), np.uint8)
        half[:, 128 * index : 128 * (index + 1)] = 255
        Image.fromarray(half).save(tmp_path / f"{name}.png")
    Image.fromarray(np.full((192, 256, 3), 99, np.uint8)).save(tmp_path / "portrait.png")
    return tmp_path


def opened(inputs, *argv):
    given = ["model=live_avatar_14b", f"image={inputs / 'portrait.png'}", f"audio={inputs / 'left.wav'}+{inputs / 'right.wav'}"]
    return open_inputs(
        compose(Entry("infer", InferConfig), [*given, f"face.masks=[{','.join(str(inputs / f'{n}.png') for n in HALVES)}]", *argv])
    )


def test_every_speaker_has_a_recording_and_a_mask(inputs):
    found = opened(inputs)
    assert [len(voice.samples) for voice in found.voices] == [8_000, 16_000]
    assert found.num_frames == 25 and len(found.speech.samples) == 16_000
    assert_close(found.speech.samples[:8_000], np.clip(sum(voice.samples[:8_000] for voice in found.voices), -1, 1))
    patches = _audio_weights(found, 16, 1.0)
    assert patches.shape == (2, 1, 12, 16)
    assert patches[0, 0, :, :8].all() and not patches[0, 0, :, 8:].any()
    assert_close(patches.sum(0), torch.ones(1, 12, 16))


def test_masks_that_do_not_fit_are_refused(inputs):
    with pytest.raises(ValueError, match="2 pictures for 1 recordings"):
        opened(inputs, f"audio={inputs / 'left.wav'}")
    Image.fromarray(np.zeros((192, 200), np.uint8)).save(inputs / "left.png")
    with pytest.raises(ValueError, match="200x192 pixels, the portrait 256x192"):
        opened(inputs)


def test_the_preview_refuses_masks_and_poses():
    for argv in ("face.masks=[a.png]", "motion.pose=pose.mp4"):
        with pytest.raises(ValueError, match="moves one face"):
            open_inputs(compose(Entry("infer", InferConfig), [argv]))


def test_a_mask_of_the_picture_counts_for_every_frame():
    model, frames = tiny_model(), 2
    given = conditions(frames)
    voices, masks = torch.randn(2, *given.audio.shape[1:]), torch.zeros(2, 1, 4, 4)
    masks[0, :, :, :2], masks[1, :, :, 2:] = 1, 1
    latents, time = torch.randn(1, 4, frames, 16, 16), torch.tensor([500.0])
    expected = model(latents, time, replace(given, audio=voices, masks=masks.expand(-1, frames, -1, -1)))
    assert_close(model(latents, time, replace(given, audio=voices, masks=masks)), expected)


def test_a_video_of_poses_is_resampled_to_the_frame_rate_of_the_video(inputs):
    with VideoWriter(inputs / "pose.mp4", 64, 64, num_frames=25) as writer:
        writer.write(np.stack([np.full((64, 64, 3), 9 * index, np.uint8) for index in range(25)]))
    seen = [round(float(frame.mean()) / 9) for frame in frames_at(inputs / "pose.mp4", 16)]
    assert len(seen) == 16 and seen == sorted(seen)
    assert all(abs(index / 25 - (k + 0.5) / 16) <= 0.06 for k, index in enumerate(seen))
    found = opened(inputs, f"motion.pose={inputs / 'pose.mp4'}")
    assert found.pose.shape == (25, *found.portrait.pixels.shape)
    assert found.pose[-1].mean() > 200


def test_logged_face_and_mouth_give_the_same_video_as_overrides(caplog):
    """They are in pixels of the photograph, although the video is half as large."""

    def opened(*argv):
        return open_inputs(compose(Entry("infer", InferConfig), ["video.size=256x256", *argv])).portrait

    with caplog.at_level("INFO", "sonic"):
        found = opened()
    box, mouth = caplog.messages[-1].split()
    again, faced = opened(box, mouth), opened(box)
    assert (again.face, again.mouth) == (found.face, found.mouth) == (faced.face, faced.mouth)


def drawn_pose(shift: float) -> np.ndarray:
    """Red shoulders, and a blue line up to a green head that is shifted by so many px."""
    picture = Image.new("RGB", (352, 192))
    draw = ImageDraw.Draw(picture)
    for line, colour in (
        ((120, 130, 232, 130), "red"),
        ((176, 130, 176 + shift, 80), "blue"),
        ((150 + shift, 70, 202 + shift, 70), "lime"),
    ):
        draw.line(line, colour, 4)
    return np.array(picture)


@pytest.mark.parametrize("scale", [0.7, 1.3, 2.0])
def test_the_head_of_a_pose_moves_as_many_times_as_far_and_the_shoulders_stay(scale):
    first, pose = drawn_pose(0), drawn_pose(14)
    moved = _moved_further(pose, first, scale)

    def column(picture: np.ndarray, channel: int) -> float:
        return float(np.argwhere(picture[..., channel] > 100)[:, 1].mean())

    head = [column(each, 1) for each in (first, pose, moved)]
    assert (head[2] - head[0]) / (head[1] - head[0]) == pytest.approx(scale, abs=0.15)
    assert abs(column(moved, 0) - column(first, 0)) < 1
    assert np.array_equal(_moved_further(first, first, scale), first)


# Length and size


def opened_alone(inputs, model, *argv):
    given = ["face_box=[60,40,80,80]", "face.mouth=[100,100,16]"] if model == "preview" else []
    named = [f"image={inputs / 'portrait.png'}", f"audio={inputs / 'right.wav'}"]
    return open_inputs(compose(Entry("infer", InferConfig), [f"model={model}", *named, *given, *argv]))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("policy", "duration", "seconds", "warns"),
    [
        ("follow", 0.7, 1.0, True),
        ("follow", 1.03, 1.0, False),
        ("trim", 0.7, 0.7, False),
        ("trim", 1.5, 1.0, True),
        ("pad", 1.5, 1.5, False),
        ("pad", 0.7, 1.0, True),
    ],
)
def test_the_sound_is_cut_or_lengthened_as_the_policy_says(inputs, model, policy, duration, seconds, warns, caplog):
    with caplog.at_level("WARNING", "sonic"):
        found = opened_alone(inputs, model, f"duration={duration}", f"duration_policy={policy}")
    spoken = babble(1.0, seed=1)[: round(16_000 * seconds)]
    assert found.num_frames == round(seconds * found.fps) and len(found.speech.samples) == round(16_000 * seconds)
    assert_close(found.speech.samples, np.pad(spoken, (0, round(16_000 * seconds) - len(spoken))))
    sentence = f"right.wav lasts {seconds:.2f} s and video.duration={duration:g}: the video follows the sound"
    assert [sentence in text for text in caplog.messages] == [True] * warns


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("duration", [0.7, 15])
def test_strict_refuses_another_length_with_both_lengths_and_the_ways_out(inputs, model, duration):
    sentence = f"right.wav lasts 1.00 s and video.duration={duration:g}: .*strict.*trim cuts.*pad adds silence.*follow makes 1.00 s"
    with pytest.raises(ValueError, match=sentence):
        opened_alone(inputs, model, f"duration={duration}", "duration_policy=strict")
    assert opened_alone(inputs, model, "duration=1.03", "duration_policy=strict").num_frames


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("policy", ["follow", "strict", "trim", "pad"])
def test_a_policy_without_a_duration_is_pointed_out(inputs, model, policy, caplog):
    with caplog.at_level("WARNING", "sonic"):
        opened_alone(inputs, model, f"duration_policy={policy}")
    sentence = f"video.duration_policy={policy} has no effect without video.duration=SECONDS"
    assert caplog.messages.count(sentence) == (policy != "follow")


def test_every_voice_lasts_the_duration(inputs):
    for policy, duration in (("trim", 0.6), ("pad", 2.0)):
        found = opened(inputs, f"duration={duration}", f"duration_policy={policy}")
        assert found.num_frames == round(25 * duration)
        assert len(found.speech.samples) == 16_000 * duration
        assert all(len(voice.samples) <= 16_000 * duration for voice in found.voices)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("photo", [(300, 200), (201, 317), (1000, 400)])
@pytest.mark.parametrize("short", [384, 400, 1080])
def test_the_short_side_is_min_resolution_on_the_grid_of_the_family_without_squeezing(inputs, model, photo, short):
    disc = np.hypot(*(np.mgrid[: photo[1], : photo[0]] + 0.5 - np.array(photo[::-1])[:, None, None] / 2)) < 60
    Image.fromarray(np.uint8(255 * disc)).convert("RGB").save(inputs / "portrait.png")
    found = opened_alone(inputs, model, f"min_resolution={short}", "video.size=704x384").portrait.pixels  # which it takes the place of
    multiple = 2 if model == "preview" else 64
    height, width = found.shape[:2]
    assert min(width, height) == -(-short // multiple) * multiple and width % multiple == height % multiple == 0
    assert abs(max(width, height) - min(width, height) * max(photo) / min(photo)) <= multiple / 2
    down, across = (np.ptp(np.flatnonzero((found[..., 0] > 127).any(axis=axis))) + 1 for axis in (1, 0))
    assert abs(down / across - 1) < 0.01  # the disc is still round


@pytest.mark.parametrize("model", MODELS)
def test_a_min_resolution_that_makes_the_video_too_large_names_the_largest(inputs, model):
    Image.new("RGB", (1000, 250)).save(inputs / "portrait.png")
    with pytest.raises(ValueError, match="video.min_resolution=1920 makes a 1000x250 photograph larger .*; use 1440 or less"):
        opened_alone(inputs, model, "min_resolution=1920")
