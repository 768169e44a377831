"""Videos of the small converted checkpoint, from the command line and from Python: lengths, seeds, files of requests."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
from infer_command import babble, write_wav
from skimage import data, io
from sonic_folder_tiny import golden_folder

from sonic import AvatarPipeline
from sonic.cli import run_command
from sonic.commands.infer_command import ENTRY, infer

BOX = "face.box=[165,70,115,115]"  # of the astronaut, to skip the detection
UNGUIDED = ("sampler.sample_guide_scale=1", "sampler.audio_guide_scale=1")  # one row in each forward


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A portrait, a recording of 0.25 s, and the checkpoint with windows so short that they take little time."""
    folder = tmp_path_factory.mktemp("sonic_svd")
    io.imsave(folder / "me.png", data.astronaut(), check_contrast=False)
    write_wav(folder / "me.wav", babble(0.25))
    shutil.copytree(golden_folder(), folder / "sonic_svd")
    manifest = json.loads((folder / "sonic_svd/manifest.json").read_text())
    manifest["config"]["unet"]["window_frames"] = 2
    (folder / "sonic_svd/manifest.json").write_text(json.dumps(manifest))
    return folder


def options(folder: Path) -> list[str]:
    """The command line of the documentation with fewer steps."""
    named = [
        f"checkpoint={folder / 'sonic_svd'}",
        f"image={folder / 'me.png'}",
        f"audio={folder / 'me.wav'}",
        f"run.folder={folder / 'runs'}",
    ]
    small = [
        "video.min_resolution=384",
        "motion.dynamic_scale=1.1",
        "sampler.sample_steps=1",
        "sampler.sample_guide_scale=1",
        "sampler.audio_guide_scale=2",
        BOX,
    ]
    return ["model=sonic_svd", "+preset=standard", *named, *small, "run.threads=1", "device=cpu"]


def command(folder: Path, *argv: str) -> int:
    return run_command(ENTRY, infer, [*options(folder), *argv])


def lengths(path: Path) -> tuple[int, float, float, float]:
    """Frames of an MP4, their rate, and the seconds of its pictures and of its sound."""
    with av.open(str(path)) as container:
        video, sound = container.streams.video[0], container.streams.audio[0]
        frames = sum(1 for _ in container.decode(video))
        return frames, float(video.average_rate), float(video.duration * video.time_base), float(sound.duration * sound.time_base)


@pytest.mark.parametrize(
    ("name", "argv", "expected"),
    [
        ("doubled", [], (6, 25, 0.24)),
        ("plain", ["video.interpolate=none"], (3, 12.5, 0.24)),
        ("upstream", ["compat=upstream"], (5, 25, 0.2)),
    ],
)
def test_pictures_and_sound_are_equally_long(folder, name, argv, expected):
    assert command(folder, *argv, f"output={folder / name}.mp4", f"name={name}") == 0
    frames, rate, pictures, sound = lengths(folder / f"{name}.mp4")
    assert (frames, rate) == expected[:2] and pictures == pytest.approx(expected[2]) and sound == pytest.approx(expected[2], abs=1e-3)
    result = json.loads((folder / "runs" / name / "result.json").read_text())
    assert (result["frames"], result["fps"]) == expected[:2]
    assert result["sampling"]["timesteps"] == [1.638]


def test_the_pipeline_finds_the_model_and_a_seed_gives_the_same_frames(folder):
    given = dict(item.split("=", 1) for item in (BOX, "run.threads=1", "video.interpolate=none", *UNGUIDED))
    steps = []
    with AvatarPipeline.from_pretrained(folder / "sonic_svd", device="cpu", **given) as pipe:
        assert pipe.config.model.name == "sonic_svd"

        def video(seed: int) -> np.ndarray:
            call = {"callback_on_step_end": lambda pipe, step, timestep, state: steps.append((step, timestep, state["block"]))}
            image, audio = folder / "me.png", folder / "me.wav"
            return pipe(image, audio, seed=seed, num_inference_steps=1, min_resolution=384, **call).frames

        first, second, other = video(1), video(1), video(2)
    assert np.array_equal(first, second) and not np.array_equal(first, other)
    assert steps == [(0, pytest.approx(998.6, abs=0.1), 0)] * 3


def test_a_bad_line_of_a_file_of_requests_stops_no_other(folder):
    lines = [{"output": str(folder / "a.mp4")}, {"output": str(folder / "b.mp4"), "image": str(folder / "missing.png")}]
    (folder / "requests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert command(folder, f"requests={folder / 'requests.jsonl'}", "name=batch", "video.interpolate=none") == 1
    videos = json.loads((folder / "runs/batch/videos.json").read_text())
    assert videos["1"]["frames"] == 3 and "missing.png" in videos["2"]["error"]
    assert lengths(folder / "a.mp4")[0] == 3 and not (folder / "b.mp4").exists()


def test_a_checkpoint_is_needed_and_must_be_of_this_model(folder, capsys):
    assert run_command(ENTRY, infer, ["model=sonic_svd", BOX, f"run.folder={folder / 'runs'}", f"audio={folder / 'me.wav'}"]) == 2
    assert "needs checkpoint=FOLDER" in capsys.readouterr().err
