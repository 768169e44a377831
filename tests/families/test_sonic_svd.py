"""The inputs of Sonic as published: which options it reads, how long its videos are, and where the face is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from infer_command import babble, write_wav
from PIL import Image

from sonic.cli import Entry, compose
from sonic.data.live_audio import LiveAudio
from sonic.families.family import family_of
from sonic.inference.infer_config import InferConfig
from sonic.inference.input_reader import open_inputs
from sonic.inference.inputs import InMemory
from sonic.inference.report import sampling_of, sampling_words

INFER = Entry("infer", InferConfig)
MODEL = ("model=sonic_svd", "checkpoint=folder")
BOX = "face.box=[165,70,115,115]"  # of the astronaut, to skip the detection


@pytest.fixture
def audio(tmp_path):
    def write(seconds: float) -> str:
        return f"audio={write_wav(tmp_path / f'{seconds}.wav', babble(seconds))}"

    return write


def opened(*argv):
    return open_inputs(compose(INFER, [*MODEL, "video.min_resolution=384", BOX, *argv]))


@pytest.mark.parametrize(
    ("seconds", "options", "frames", "fps"),
    [
        (1.0, [], 24, 25),
        (1.0, ["video.interpolate=none"], 12, 12.5),
        (1.0, ["compat=upstream"], 23, 25),
        (0.2, [], 4, 25),
        (4.0, ["video.num_clip=1"], 48, 25),
        (4.0, ["video.num_clip=1", "video.infer_frames=9"], 8, 25),
        (4.0, ["video.num_clip=1", "video.infer_frames=1"], 2, 25),
        (0.5, ["video.duration=1", "video.duration_policy=pad"], 24, 25),
    ],
)
def test_a_video_has_two_frames_for_each_frame_of_the_model(audio, seconds, options, frames, fps):
    inputs = opened(audio(seconds), *options)
    assert (inputs.num_frames, inputs.fps) == (frames, fps)
    assert inputs.clip_frames / 12.5 == pytest.approx(-(-frames // 2) / 12.5 if fps == 25 else frames / 12.5)


def test_less_sound_than_a_frame_is_refused(audio):
    with pytest.raises(ValueError, match="lasts 0.08 s, the shortest recording is 0.2 s"):
        opened(audio(0.079))


@pytest.mark.parametrize(
    "given",
    [
        "motion.head=gentle",
        "motion.motion_scale=1.5",
        "face.mouth=[223,160,22]",
        "face.expand_ratio=0.2",
        "video.size=704x384",
        "video.min_resolution=1088",
        "sampler.name=heun",
        "sampler.schedule=linear",
    ],
)
def test_options_that_the_family_does_not_read_are_refused(audio, given):
    argv = [*MODEL, BOX, audio(0.5), "sampler=sonic"]
    with pytest.raises(ValueError, match=given.replace("[", r"\[").split(",")[0].split("gentle")[0]):
        open_inputs(compose(INFER, [*argv, given]))


def test_sound_that_is_still_arriving_is_refused():
    config = compose(INFER, [*MODEL, BOX])
    with pytest.raises(ValueError, match="denoises the whole clip at once and needs its sound whole"):
        open_inputs(config, InMemory(sound=LiveAudio(iter([]))))


@pytest.mark.parametrize("given", ["sampler.audio_guide_scale=3", "face.missing=whole", "video.interpolate=rife"])
@pytest.mark.parametrize("model", ["preview", "live_avatar_14b"])
def test_options_of_this_family_are_refused_by_others(given, model):
    with pytest.raises(ValueError, match=given):
        open_inputs(compose(INFER, [f"model={model}", given]))


def test_a_picture_without_a_face_is_refused_or_moved_whole(audio, tmp_path, caplog):
    Image.fromarray(np.full((400, 480, 3), 120, np.uint8)).save(tmp_path / "wall.png")
    argv = [*MODEL, "video.min_resolution=384", audio(0.5), f"image={tmp_path / 'wall.png'}"]
    with pytest.raises(ValueError, match="no face is seen in the photo .* face.missing=whole"):
        open_inputs(compose(INFER, argv))
    inputs = open_inputs(compose(INFER, [*argv, "face.missing=whole"]))
    assert (inputs.picture.face_mask == 1).all() and "face.missing=whole" in caplog.text


def test_the_mask_is_white_where_the_face_is_found(audio):
    found, given = (open_inputs(compose(INFER, [*MODEL, "video.min_resolution=384", audio(0.5), *more])) for more in ([], [BOX]))
    overlap = (found.picture.face_mask * given.picture.face_mask).sum() / found.picture.face_mask.sum()
    assert overlap > 0.5 and 0.01 < found.picture.face_mask.mean() < 0.2
    box = found.location["face_box"]
    again = open_inputs(compose(INFER, [*MODEL, "video.min_resolution=384", audio(0.5), f"face.box=[{','.join(map(str, box))}]"]))
    assert torch.equal(again.picture.face_mask, found.picture.face_mask)


def test_the_picture_is_cropped_and_upstream_squeezes_it(audio, tmp_path):
    pixels = np.zeros((384, 600, 3), np.uint8)
    pixels[:, :12] = 255  # cropped away, or squeezed in
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    argv = [f"image={tmp_path / 'wide.png'}", audio(0.5)]
    fitted, squeezed = opened(*argv), opened(*argv, "compat=upstream")
    assert fitted.portrait.pixels.shape == squeezed.portrait.pixels.shape == (384, 576, 3)
    assert fitted.portrait.pixels[:, :3].min() < 255 or fitted.portrait.pixels[:, 1].mean() != squeezed.portrait.pixels[:, 1].mean()
    assert (fitted.portrait.pixels[:, 2] < 255).any() and (squeezed.portrait.pixels[:, 2] == 255).all()


def test_a_picture_is_turned_once(audio, tmp_path):
    picture = Image.fromarray(np.zeros((384, 512, 3), np.uint8))
    exif = picture.getexif()
    exif[0x0112] = 6  # to be shown turned by a quarter
    picture.save(tmp_path / "turned.jpg", exif=exif)
    inputs = opened(f"image={tmp_path / 'turned.jpg'}", audio(0.5))
    assert inputs.portrait.pixels.shape == (512, 384, 3) and inputs.picture.ref.shape == (3, 512, 384)


def test_the_presets_choose_size_and_steps():
    found = {}
    for preset in ("fast_preview", "standard", "quality", "streaming", "low_memory"):
        config = compose(INFER, ["model=sonic_svd", f"+preset={preset}"])
        found[preset] = (config.video.min_resolution, config.sampler.sample_steps)
        guides = (config.sampler.schedule, config.sampler.sample_guide_scale, config.sampler.audio_guide_scale)
        assert guides == ("karras", 2.0, 7.5)
    assert found["fast_preview"] == (384, 10) and found["standard"] == (512, 25) and found["quality"] == (1024, 25)
    plain = compose(INFER, ["model=sonic_svd"])
    assert (plain.video.min_resolution, plain.sampler.sample_steps, plain.video.interpolate) == (512, 25, "rife")


def test_a_run_says_which_timesteps_the_network_is_given():
    sampler = compose(INFER, ["model=sonic_svd", "sampler.sample_steps=4"]).sampler
    timesteps = family_of(compose(INFER, ["model=sonic_svd"]).model).timesteps(sampler)
    found = sampling_of(sampler, "a file", torch.float32, timesteps=timesteps)
    assert found["timesteps"] == [1.638, 1.064, 0.205, -1.554]
    assert "schedule karras (computed): timesteps 1.6, 1.1, 0.2, -1.6; guidance 2 and 7.5" in sampling_words(found)
