"""Length and size of finished videos, read from the MP4: video.duration and video.min_resolution for every family."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import pytest
import torch
from convert_command import PROMPT, infer
from infer_command import FACE, TINY, babble, write_wav, write_weights
from PIL import Image
from skimage import data

from sonic.data.audio import load_soundtrack

FPS = {"preview": 25, "live": 25, "wan": 16}
SPOKEN = 0.6  # seconds of the recording


class Found(NamedTuple):
    """What an MP4 holds: frames, seconds of its sound track, and (width, height)."""

    frames: int
    sound: float
    size: tuple[int, int]


@pytest.fixture(autouse=True)
def one_thread():
    """Videos are made with one thread, as every rank has it."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def models(ready, tmp_path_factory) -> dict[str, list[str]]:
    """The options of a tiny model of every family."""
    weights = write_weights(tmp_path_factory.mktemp("preview") / "weights")
    published = (f"prompt={PROMPT}", "run.dtype=float32", "sampler.sample_steps=1", "sampler.sample_guide_scale=1", "run.threads=1")
    return {
        "preview": [f"weights={weights}", *FACE, *TINY, "run.threads=1"],
        "live": ["model=live_avatar_14b", f"checkpoint={ready / 'live'}", *published],
        "wan": ["model=wan_s2v_14b", f"checkpoint={ready / 'wan'}", *published, "video.infer_frames=8"],
    }


@pytest.fixture
def folder(tmp_path) -> Path:
    write_wav(tmp_path / "speech.wav", babble(SPOKEN))
    return tmp_path


def small(model: str) -> list[str]:
    return [] if model == "preview" else ["video.size=64x64"]


def made(folder: Path, *argv: str) -> Found:
    output = folder / "a.mp4"
    assert infer(folder, f"audio={folder / 'speech.wav'}", *argv, f"output={output}") == 0
    with av.open(output) as container:
        (video, sound) = container.streams
        frames = sum(1 for _ in container.decode(video))
        return Found(frames, float(sound.duration * sound.time_base), (video.width, video.height))


@pytest.mark.parametrize(
    ("policy", "duration", "seconds"),
    [
        ("follow", 0.4, SPOKEN),
        ("strict", SPOKEN + 0.03, SPOKEN),
        ("trim", 0.4, 0.4),
        ("pad", 0.9, 0.9),
    ],
)
@pytest.mark.parametrize("model", FPS)
def test_frames_and_sound_last_what_the_policy_makes_of_the_duration(models, folder, model, policy, duration, seconds, capsys):
    found = made(folder, *models[model], *small(model), f"video.duration={duration}", f"video.duration_policy={policy}")
    assert found.frames == round(seconds * FPS[model])
    assert found.sound == pytest.approx(found.frames / FPS[model], abs=0.001)
    warned = [line for line in capsys.readouterr().err.splitlines() if "sonic: warning" in line]
    assert len(warned) == (abs(seconds - duration) > 1 / FPS[model])
    assert all(f"lasts {seconds:.2f} s and video.duration={duration:g}" in each and "pad adds silence" in each for each in warned)


@pytest.mark.parametrize("model", FPS)
def test_a_recording_of_another_length_is_refused_by_strict(models, folder, model, capsys):
    given = [*models[model], *small(model), f"audio={folder / 'speech.wav'}", "duration=15", "duration_policy=strict"]
    assert infer(folder, *given, f"output={folder / 'a.mp4'}") == 2
    sentence = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"speech.wav lasts {SPOKEN:.2f} s and video.duration=15: video.duration_policy=strict" in sentence and "trim cuts" in sentence
    assert not (folder / "a.mp4").exists()


@pytest.mark.parametrize("model", FPS)
@pytest.mark.parametrize(("policy", "seconds"), [("trim", 0.4), ("pad", 0.9)])
def test_the_video_is_that_of_a_recording_that_was_cut_or_lengthened_before(models, folder, model, policy, seconds):
    given = [*models[model], *small(model)]
    made(folder, *given, f"video.duration={seconds}", f"video.duration_policy={policy}")
    by_policy = list(read(folder / "a.mp4"))
    sound = load_soundtrack(folder / "a.mp4")
    samples = babble(SPOKEN)[: round(16_000 * seconds)]
    write_wav(folder / "speech.wav", np.pad(samples, (0, round(16_000 * seconds) - len(samples))))
    made(folder, *given)
    assert np.array_equal(by_policy, list(read(folder / "a.mp4")))
    assert np.abs(sound[round(16_000 * SPOKEN) + 1600 :]).max(initial=0) < 1e-3  # silence behind the recording
    assert np.abs(sound[: len(samples)]).max() > 0.1


def read(path: Path):
    with av.open(path) as container:
        yield from (frame.to_ndarray(format="rgb24") for frame in container.decode(video=0))


@pytest.mark.parametrize(("model", "frames"), [("live", 12), ("wan", 8)])
def test_the_voices_of_several_speakers_are_cut_together(models, folder, model, frames):
    for index, name in enumerate(("left", "right")):
        write_wav(folder / f"{name}.wav", babble(0.3 + index, seed=index))
        half = np.zeros((192, 256), np.uint8)
        half[:, 128 * index : 128 * (index + 1)] = 255
        Image.fromarray(half).save(folder / f"{name}.png")
    Image.fromarray(np.full((192, 256, 3), 99, np.uint8)).save(folder / "me.png")
    masks = f"face.masks=[{folder / 'left.png'},{folder / 'right.png'}]"
    voices = [f"image={folder / 'me.png'}", f"audio={folder / 'left.wav'}+{folder / 'right.wav'}", masks]
    found = made(folder, *models[model], *small(model), *voices, "video.duration=0.5", "video.duration_policy=trim")
    assert found.frames == frames and found.sound == pytest.approx(frames / FPS[model], abs=0.001)


@pytest.mark.parametrize(
    ("model", "photo", "short", "size"),
    [
        ("preview", (300, 200), 384, (576, 384)),  # enlarged
        ("preview", (501, 700), 400, (400, 558)),  # scaled down
        ("wan", (256, 256), 384, (384, 384)),
    ],
)
def test_the_short_side_of_the_video_is_min_resolution(models, folder, model, photo, short, size):
    Image.fromarray(data.astronaut()).resize(photo).save(folder / "me.png")
    box = ["face_box=[60,40,80,80]", "face.mouth=[100,100,16]"] if model == "preview" else []
    given = [*models[model], *box, f"image={folder / 'me.png'}", "video.duration=0.3", "video.duration_policy=trim"]
    assert made(folder, *given, f"min_resolution={short}").size == size
