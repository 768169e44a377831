"""Videos with converted checkpoints, from the command line: both models, on one rank and on two, several speakers, a video of poses."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from convert_command import PROMPT, infer
from infer_command import babble, write_wav
from infer_command_ranks import infer_on
from PIL import Image
from video_files import read_frames

from sonic.data.audio import load_soundtrack, load_speech
from sonic.data.video import VideoWriter
from sonic.evaluation.judge import sound_offset as offset_between
from sonic.system.program import command_words
from sonic.vae.wan_vae import WanAutoencoder

SMALL = ("video.size=64x64", "run.threads=1", "run.dtype=float32")  # as exact as the tests
SHORT = {  # a video of two blocks or clips
    "live": ("model=live_avatar_14b", "sampler=live_avatar_3step", "video.infer_frames=12", "video.num_clip=2"),
    "wan": ("model=wan_s2v_14b", "sampler=unipc", "sampler.sample_steps=2", "video.infer_frames=8", "video.num_clip=2"),
}
TWO_RANKS = command_words("infer", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture(autouse=True)
def one_thread():
    """Videos are made with one thread, as every rank has it."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def arguments(ready: Path, model: str, *extra: str) -> list[str]:
    return [*SHORT[model], f"checkpoint={ready / model}", f"audio={ready / 'speech.wav'}", f"prompt={PROMPT}", *SMALL, *extra]


def generate(folder: Path, name: str, *argv: str) -> bytes:
    assert infer(folder, *argv, f"output={folder / name}.mp4", f"name={name}") == 0
    return (folder / f"{name}.mp4").read_bytes()


@pytest.fixture(scope="module")
def alone(ready, tmp_path_factory) -> dict[str, bytes]:
    """Short videos of one rank."""
    folder, threads = tmp_path_factory.mktemp("alone"), torch.get_num_threads()
    made = {model: generate(folder, model, *arguments(ready, model)) for model in SHORT}
    torch.set_num_threads(threads)
    return made


def frames_of(folder: Path, name: str) -> np.ndarray:
    return np.stack(list(read_frames(folder / f"{name}.mp4")))


@pytest.mark.parametrize(
    ("model", "extra", "frames"),
    [
        ("live", ["video.num_clip=0"], 38),  # all of the recording
        ("live", ["compat=upstream"], 21),
        ("wan", ["video.num_clip=0", "video.infer_frames=16"], 24),
        ("wan", ["compat=upstream", "video.infer_frames=16"], 29),
    ],
)
def test_a_converted_checkpoint_generates_a_video(ready, tmp_path, model, extra, frames):
    generate(tmp_path, "a", *arguments(ready, model, *extra))
    assert len(frames_of(tmp_path, "a")) == frames
    result = json.loads((tmp_path / "runs/a/result.json").read_text())
    assert result["fps"] == (25 if model == "live" else 16)
    assert (tmp_path / "runs/a/contact_sheet.png").exists()


@pytest.mark.parametrize("model", SHORT)
def test_a_video_of_twice_the_frame_rate_has_the_frames_of_the_model_and_its_length(ready, tmp_path, model):
    """Smoothing leaves them too, because random weights generate no face."""
    for name, extra in (("plain", []), ("double", ["post.interpolate=2", "post.smooth_motion=1"])):
        generate(tmp_path, name, *arguments(ready, model, *extra))
    plain, double = (frames_of(tmp_path, name).astype(int) for name in ("plain", "double"))
    assert len(double) == 2 * len(plain) and np.abs(double[::2] - plain).mean() < 8  # two H.264 videos of noise
    before, after = (json.loads((tmp_path / f"runs/{name}/result.json").read_text()) for name in ("plain", "double"))
    assert (after["frames"], after["fps"]) == (2 * before["frames"], 2 * before["fps"])


@pytest.mark.parametrize("steps", [1, 2, 5, 8])
@pytest.mark.parametrize("model", SHORT)
def test_any_number_of_steps_works_in_the_models_own_precision(ready, tmp_path, model, steps):
    typed = [
        f"sampler.sample_steps={steps}",
        "sampler.sample_guide_scale=0",
        "video.infer_frames=8",
        "video.num_clip=1",
        "video.size=64*64",
    ]
    given = [SHORT[model][0], f"checkpoint={ready / model}", f"audio={ready / 'speech.wav'}", f"prompt={PROMPT}", "run.threads=1", *typed]
    generate(tmp_path, "a", *given)
    assert len(frames_of(tmp_path, "a")) == 8
    found, log = json.loads((tmp_path / "runs/a/result.json").read_text())["sampling"], (tmp_path / "runs/a/log.txt").read_text()
    assert (found["schedule"], found["steps"], found["guide_scale"]) == ("unipc" if model == "wan" else "live_avatar", steps, 1.0)
    assert (found["dtype"], found["weights"]) == ("bfloat16", str(ready / model / "dit"))
    assert (len(found["sigmas"]), len(found["timesteps"])) == (steps + 1, steps)
    assert f"{steps} steps of schedule {found['schedule']}" in log and "no guidance" in log


@pytest.mark.parametrize(("model", "plan"), [("wan", "parallel=fsdp"), ("live", "parallel=auto")])
def test_two_ranks_make_the_video_of_one(ready, alone, tmp_path, model, plan):
    argv = arguments(ready, model)
    paths = (f"output={tmp_path / 'two.mp4'}", f"run.folder={tmp_path / 'runs'}", "name=two", "device=cpu")
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*TWO_RANKS, *argv, plan, *paths], capture_output=True, text=True, timeout=280, check=False, env=environ)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "two.mp4").read_bytes() == alone[model]


def test_layers_on_two_ranks_and_the_vae_on_a_third_make_the_video_of_one(ready, alone, tmp_path):
    apart = ("parallel=pipeline", "parallel.vae_rank=true", f"output={tmp_path / 'three.mp4'}")
    codes, output = infer_on(3, [*arguments(ready, "live"), *apart], tmp_path, before=weigh)
    assert codes == [0] * 3, output
    assert (tmp_path / "three.mp4").read_bytes() == alone["live"]
    assert re.findall(r"VAE on (\d)", output) == ["2"]  # no other rank loads its weights


@pytest.mark.parametrize("model", SHORT)
def test_the_sound_of_every_family_is_shifted_and_an_unsure_measure_changes_nothing(ready, alone, tmp_path, model):
    generate(tmp_path, "late", *arguments(ready, model, "post.alignment_offset=0.0321", "post.lip_align=true"))
    (tmp_path / "alone.mp4").write_bytes(alone[model])
    assert np.array_equal(frames_of(tmp_path, "late"), frames_of(tmp_path, "alone"))
    found = json.loads((tmp_path / "runs/late/result.json").read_text())["sound"]
    assert found["later_s"] == 0.0321 and found["lip_align"]["unsure"]
    recording = load_speech(ready / "speech.wav").samples
    assert offset_between(load_soundtrack(tmp_path / "late.mp4"), recording, 16_000)[0] == round(0.0321 * 16_000)


def weigh(rank: int) -> None:
    """Log the rank on which a VAE is loaded."""
    load_tensors = WanAutoencoder.load_tensors
    WanAutoencoder.load_tensors = lambda *arguments: sys.stderr.write(f"VAE on {rank}\n") and load_tensors(*arguments)


def test_a_known_prompt_needs_no_text_encoder(ready, tmp_path):
    copy = shutil.copytree(ready / "live", tmp_path / "live")
    made = [*arguments(ready, "live", "video.num_clip=1"), f"checkpoint={copy}", f"prompt={PROMPT} calm"]
    assert infer(tmp_path, *made, f"output={tmp_path / 'a.mp4'}") == 0
    shutil.rmtree(copy / "text_encoder")
    assert infer(tmp_path, *made, f"output={tmp_path / 'b.mp4'}") == 0
    assert infer(tmp_path, *made, "prompt=another", f"output={tmp_path / 'c.mp4'}") == 2


@pytest.fixture
def pair(tmp_path) -> list[str]:
    """A portrait of two, with a mask and a recording for each: the left one speaks first, the right one longer."""
    for index, (name, seconds) in enumerate((("left", 0.5), ("right", 0.8))):
        write_wav(tmp_path / f"{name}.wav", babble(seconds, seed=index))
        half = np.zeros((192, 192), np.uint8)
        half[:, 96 * index : 96 * (index + 1)] = 255
        Image.fromarray(half).save(tmp_path / f"{name}.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (192, 192, 3), np.uint8)).save(tmp_path / "both.png")
    voices, masks = (ending.join(str(tmp_path / name) for name in ("left", "right")) for ending in (".wav+", ".png,"))
    return [f"image={tmp_path / 'both.png'}", f"audio={voices}.wav", f"face.masks=[{masks}.png]"]


@pytest.mark.parametrize("model", SHORT)
def test_two_speakers_follow_their_own_recordings(ready, tmp_path, pair, model):
    argv = [item for item in arguments(ready, model) if not item.startswith("audio=")]
    generate(tmp_path, "both", *argv, *pair)
    audio, masks = (item.partition("=") for item in pair[1:])
    swapped = [f"{audio[0]}={'+'.join(reversed(audio[2].split('+')))}", f"{masks[0]}=[{','.join(reversed(masks[2][1:-1].split(',')))}]"]
    generate(tmp_path, "again", *argv, pair[0], *swapped)
    generate(tmp_path, "crossed", *argv, pair[0], swapped[0], pair[2])
    both, again, crossed = (frames_of(tmp_path, name).astype(int) for name in ("both", "again", "crossed"))
    assert len(both) == (20 if model == "live" else 13)  # as long as the longer recording
    print("DIFF", abs(both - again).mean(), abs(both - crossed).mean())
    assert abs(both - again).mean() < 1  # the order of the speakers does not matter
    assert abs(both - crossed).mean() > 3


@pytest.mark.parametrize("model", SHORT)
def test_a_video_of_poses_is_followed(ready, tmp_path, model):
    with VideoWriter(tmp_path / "pose.mp4", 64, 64, num_frames=25) as writer:
        writer.write(np.random.default_rng(0).integers(0, 256, (25, 64, 64, 3), np.uint8))
    generate(tmp_path, "free", *arguments(ready, model))
    generate(tmp_path, "posed", *arguments(ready, model, f"motion.pose={tmp_path / 'pose.mp4'}"))
    free, posed = (frames_of(tmp_path, name).astype(int) for name in ("free", "posed"))
    assert free.shape == posed.shape
    assert abs(free - posed).mean() > 3


@pytest.mark.parametrize(("model", "plan"), [("live", "context"), ("wan", "fsdp")])
def test_dynamic_scale_drives_the_video_harder_alike_on_one_rank_and_two(ready, alone, tmp_path, capfd, model, plan):
    argv = arguments(ready, model, "motion.dynamic_scale=2.0", "motion.motion_scale=1.3")
    generate(tmp_path, "scaled", *argv)
    assert "motion.motion_scale=1.3 has no effect" in capfd.readouterr().err
    generate(tmp_path, "usual", *arguments(ready, model, "motion.dynamic_scale=1.0"))
    assert (tmp_path / "usual.mp4").read_bytes() == alone[model]
    codes, output = infer_on(2, [*argv, f"parallel={plan}", f"output={tmp_path / 'two.mp4'}"], tmp_path)
    assert codes == [0, 0], output
    two, one, usual = (frames_of(tmp_path, name).astype(int) for name in ("two", "scaled", "usual"))
    assert abs(two - one).mean() < 0.5 < 1 < abs(one - usual).mean()  # half as many tokens are rounded otherwise, and compressed so


@pytest.mark.parametrize("model", SHORT)
def test_motion_scale_leads_the_video_by_poses_that_move_further(ready, tmp_path, model):
    with VideoWriter(tmp_path / "pose.mp4", 64, 64, num_frames=25) as writer:
        writer.write(np.stack([upright(32 + index % 8) for index in range(25)]))
    for name, scale in (("usual", 1.0), ("further", 2.0)):
        generate(tmp_path, name, *arguments(ready, model, f"motion.pose={tmp_path / 'pose.mp4'}", f"motion.motion_scale={scale}"))
    usual, further = (frames_of(tmp_path, name).astype(int) for name in ("usual", "further"))
    assert usual.shape == further.shape and abs(usual - further).mean() > 0.1


def upright(column: int) -> np.ndarray:
    """A drawn line."""
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[16:48, column - 2 : column + 2] = 0, 0, 255
    return picture


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ("audio={left}.wav", "2 pictures for 1 recordings"),
        ("face.masks=[{left}.png]", "1 pictures for 2 recordings"),
        ("face.masks=[{left}.png,{nowhere}.png]", "face.masks={nowhere}.png does not exist"),
        ("face.masks=[{left}.png,{small}.png]", "160x160 pixels, the portrait 192x192"),
        ("audio={left}.wav+{nowhere}.wav", "nowhere.wav"),
        ("motion.pose={nowhere}.mp4", "nowhere.mp4"),
        ("motion.pose={left}.wav", "left.wav"),
    ],
)
def test_faults_of_speakers_and_poses_are_reported(ready, tmp_path, pair, capfd, change, word):
    Image.fromarray(np.zeros((160, 160), np.uint8)).save(tmp_path / "small.png")
    paths = {name: str(tmp_path / name) for name in ("left", "small", "nowhere")}
    before = sorted(tmp_path.iterdir())
    assert infer(tmp_path, *arguments(ready, "live"), *pair, change.format(**paths), f"output={tmp_path / 'a.mp4'}") == 2
    output = capfd.readouterr().err
    assert word.format(**paths) in output and "Traceback" not in output
    assert sum(line.startswith("sonic: error") for line in output.splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before
