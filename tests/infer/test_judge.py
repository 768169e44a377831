"""Laws of judging a finished film."""

import json

import numpy as np
import pytest
from PIL import Image

from sonic.config import FacePlaceConfig, JudgeConfig
from sonic.data.speech import envelope, load_speech, save_speech
from sonic.data.video import Coding, VideoWriter
from sonic.infer.judge import judge, pauses

FACE = FacePlaceConfig(box=[40.0, 30.0, 60.0, 60.0], mouth=[70.0, 78.0, 12.0])
FRAMES = 75


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A photograph, a recording that swells and falls and pauses, and nothing else."""
    folder = tmp_path_factory.mktemp("judge")
    smooth = np.linspace(60, 180, 160)[None, :, None] + np.linspace(0, 40, 128)[:, None, None] + np.zeros(3)
    Image.fromarray(smooth.astype(np.uint8)).save(folder / "face.png")
    seconds = np.arange(FRAMES * 640) / 16000
    swell = np.clip(np.sin(2 * np.pi * 1.3 * seconds), 0, 1) * (seconds < 2.0)
    save_speech(folder / "speech.flac", (0.5 * swell * np.random.default_rng(0).standard_normal(len(seconds)) / 3).astype(np.float32))
    return folder


MOUTH = np.s_[72:90, 58:82]  # rows and columns


def film(folder, name, motion, fps=25, where=MOUTH):
    """A film of the photograph whose mouth (or another part) brightens by motion[k] grey levels in frame k."""
    photo = np.array(Image.open(folder / "face.png"))
    with VideoWriter(folder / name, 160, 128, num_frames=len(motion), coding=Coding(fps=fps)) as writer:
        for strength in motion:
            frame = photo.astype(np.float32)
            frame[where] += strength
            writer.write(frame.clip(0, 255).astype(np.uint8)[None])
    return JudgeConfig(
        film=str(folder / name), image=str(folder / "face.png"), audio=str(folder / "speech.flac"), json=str(folder / "out.json"), face=FACE
    )


def sound(folder, frames=FRAMES, fps=25):
    return envelope(load_speech(folder / "speech.flac").samples, 16000, frames, fps=fps)


@pytest.mark.parametrize("late", [0, 4])
def test_the_lag_of_the_mouth_is_found(folder, late):
    motion = np.roll(200 * sound(folder), late)
    found = judge(film(folder, f"late{late}.mp4", motion))
    assert found["speech_correlation"] > 0.9
    assert abs(found["lag_frames"] - late) < 0.6
    assert json.loads((folder / "out.json").read_text())["lag_frames"] == found["lag_frames"]


def test_a_film_of_another_rate_is_held_against_the_sound_of_its_own_frames(folder):
    found = judge(film(folder, "slow.mp4", 200 * sound(folder, 48, 16), fps=16))
    assert found["speech_correlation"] > 0.9
    assert abs(found["lag_frames"]) < 0.6


def test_a_mouth_that_ignores_the_speech_scores_low(folder):
    motion = 40 * np.random.default_rng(1).random(FRAMES)
    found = judge(film(folder, "noise.mp4", motion))
    assert found["speech_correlation"] < 0.5
    assert found["rest_ratio"] > 0.5


def test_the_mouth_itself_does_not_count_as_damage_to_the_photograph(folder):
    still, moving = (judge(film(folder, name, level * np.ones(FRAMES)))["photo_psnr_db"] for name, level in (("a.mp4", 0), ("b.mp4", 60)))
    assert still > 38 and moving > 36


def test_damage_counts_by_its_mean_square_over_all_frames(folder):
    motion = np.where(np.arange(FRAMES) < FRAMES // 3, 20, 0)  # of the first third of the film
    found = judge(film(folder, "damaged.mp4", motion, where=np.s_[:, :]))
    assert found["photo_psnr_db"] == pytest.approx(10 * np.log10(255**2 / (20**2 / 3)), abs=0.3)


@pytest.mark.parametrize(("rows", "counts"), [(np.s_[34:52], True), (np.s_[93:111], False), (np.s_[119:127], True)])
def test_the_chin_may_move_and_forehead_and_chest_may_not(folder, rows, counts):
    """The chin of this face lies at row 90; a jaw that opens, and its shadow, reach below it."""
    found = judge(film(folder, "part.mp4", np.full(FRAMES, 60), where=(rows, np.s_[58:82])))
    assert (found["photo_psnr_db"] < 33) is counts


def test_the_rest_ratio_is_the_motion_in_long_pauses_against_that_in_loud_frames(folder):
    """What happens in the short gaps between two words counts for neither."""
    level, after = sound(folder), np.arange(FRAMES) > 47 + 5  # the last word ends in frame 47
    motion = np.where(after, 20, np.where(level > np.median(level), 80, 50))
    assert judge(film(folder, "rest.mp4", motion))["rest_ratio"] == pytest.approx(20 / 80, rel=0.03)


def test_a_pause_is_far_from_every_sound():
    level = np.ones(60)
    level[20:40] = 1e-6
    assert pauses(level).nonzero()[0].tolist() == list(range(25, 35))


def test_a_film_of_another_size_is_refused(folder):
    config = film(folder, "c.mp4", np.zeros(FRAMES))
    config.size = "100x80"
    with pytest.raises(ValueError, match="size"):
        judge(config)
