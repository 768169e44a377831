"""Every fault of the input is reported in one sentence with exit code 2, and no files are left behind."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from infer_command import FACE, TINY, babble, write_wav, write_weights
from PIL import Image
from safetensors.torch import load_file, save_file
from skimage import data

from sonic.cli import Entry, run_command
from sonic.commands import convert_command, infer_command
from sonic.data.video import VideoWriter
from sonic.evaluation.judge_config import JudgeConfig


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return write_weights(tmp_path_factory.mktemp("parts") / "weights")


@pytest.fixture
def sentence(tmp_path, monkeypatch, capsys):
    """Runs the command in an empty folder and gives its error message, after checking the exit code and the files."""
    (tmp_path / "inputs").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run(*argv: str) -> str:
        code = run_command(infer_command.ENTRY, infer_command.infer, argv)
        output = capsys.readouterr()
        lines = output.err.strip().splitlines()
        assert code == 2, output
        assert lines[-1].startswith("sonic: error: ") and "Traceback" not in output.err, output.err
        assert sum("error:" in line for line in lines) == 1
        assert list((tmp_path / "here").iterdir()) == [], "something was left behind"
        return lines[-1].removeprefix("sonic: error: ")

    return run


@pytest.fixture
def inputs(tmp_path) -> Path:
    return tmp_path / "inputs"


def empty_file(folder: Path) -> Path:
    (folder / "empty").touch()
    return folder / "empty"


def text_file(folder: Path) -> Path:
    (folder / "letter.txt").write_text("not what it seems\n" * 50)
    return folder / "letter.txt"


def truncated_picture(folder: Path) -> Path:
    Image.fromarray(data.astronaut()).save(folder / "whole.jpg")
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:9000])
    return folder / "cut.jpg"


def tiny_picture(folder: Path) -> Path:
    Image.fromarray(data.astronaut()[:60, :60]).save(folder / "tiny.png")
    return folder / "tiny.png"


def not_numbers(folder: Path) -> Path:
    return write_wav(folder / "nan.wav", np.where(np.arange(16_000) % 100, babble(1.0), np.float32("nan")).astype(np.float32))


def corrupt_audio(folder: Path) -> Path:
    whole = write_wav(folder / "whole.wav", babble(1.0)).read_bytes()
    (folder / "corrupt.mp3").write_bytes(np.random.default_rng(0).bytes(5000) + whole[:10])
    return folder / "corrupt.mp3"


def video(folder: Path) -> Path:
    with VideoWriter(folder / "video.mp4", 64, 64, num_frames=5) as writer:
        writer.write(np.zeros((5, 64, 64, 3), np.uint8))
    return folder / "video.mp4"


BAD_PORTRAITS = {
    "missing": (lambda folder: folder / "nowhere.jpg", "does not exist"),
    "folder": (lambda folder: folder, "directory"),
    "empty": (empty_file, "image="),
    "not_an_image": (text_file, "not a picture"),
    "truncated": (truncated_picture, "damaged or cut off"),
    "too_small": (tiny_picture, "at least 64 px"),
}
BAD_RECORDINGS = {
    "missing": (lambda folder: folder / "nowhere.wav", "does not exist"),
    "folder": (lambda folder: folder, "is a folder"),
    "empty": (empty_file, "is an empty file"),
    "silent": (lambda folder: write_wav(folder / "silent.wav", np.zeros(16_000, np.float32)), "is silent"),
    "too_short": (lambda folder: write_wav(folder / "short.wav", babble(0.05)), "0.05 s"),
    "not_numbers": (not_numbers, "not numbers"),
    "corrupt": (corrupt_audio, "audio="),
    "text": (text_file, "audio="),
    "video": (video, "is a video"),
}


@pytest.mark.parametrize("case", BAD_PORTRAITS)
def test_a_bad_portrait_is_refused_in_one_sentence(case, sentence, inputs):
    make, word = BAD_PORTRAITS[case]
    assert word in sentence(f"image={make(inputs)}", *FACE)


@pytest.mark.parametrize("case", BAD_RECORDINGS)
def test_a_bad_recording_is_refused_in_one_sentence(case, sentence, inputs):
    make, word = BAD_RECORDINGS[case]
    assert word in sentence(f"audio={make(inputs)}", *FACE)


def test_a_picture_without_a_face_names_the_override(sentence, inputs):
    Image.fromarray(np.tile(np.arange(128, dtype=np.uint8), (128, 1))).save(inputs / "sky.png")
    output = sentence(f"image={inputs / 'sky.png'}")
    assert "no face" in output and "face_box=[x,y,w,h]" in output


@pytest.mark.parametrize(("output", "word"), [("missing/out.mp4", "does not exist"), (".", "is a folder"), ("out.avi", ".mp4")])
def test_a_bad_output_is_refused_in_one_sentence(output, word, sentence):
    assert word in sentence(f"output={output}", *FACE)


def test_a_read_only_output_folder_is_refused(sentence, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("sonic.data.video.tempfile.TemporaryFile", refuse)
    assert "cannot be written" in sentence("output=out.mp4", *FACE)


def test_a_run_folder_that_cannot_be_made_is_refused(sentence, inputs, weights):
    (inputs / "runs").touch()
    assert str(inputs / "runs") in sentence(f"run.folder={inputs / 'runs'}", f"weights={weights}", *FACE, *TINY)


def test_a_full_disk_is_noticed_before_the_work(sentence, monkeypatch, weights):
    monkeypatch.setattr("sonic.data.video.shutil.disk_usage", lambda folder: shutil._ntuple_diskusage(100, 99, 1))
    for output in ([], ["output=out.mp4"]):
        assert "free" in sentence(*output, f"weights={weights}", *FACE, *TINY)


def test_a_disk_that_fills_up_leaves_no_partial_video(sentence, monkeypatch, weights, inputs):
    def full(self, pixels):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sonic.data.video.VideoWriter.write", full)
    recording = write_wav(inputs / "speech.wav", babble(0.6))
    for output in ([], ["output=out.mp4"]):
        assert "the disk is full" in sentence(f"audio={recording}", f"weights={weights}", *output, *FACE, *TINY)


@pytest.mark.parametrize("file", ["preview_dit.safetensors", "preview_autoencoder.safetensors", "preview_speech.safetensors"])
def test_truncated_weights_are_refused(file, sentence, weights, inputs):
    shutil.copytree(weights, inputs / "weights")
    (inputs / "weights" / file).write_bytes((weights / file).read_bytes()[:-1000])
    output = sentence(f"weights={inputs / 'weights'}", *FACE, *TINY)
    assert file in output and "cut short" in output


@pytest.mark.parametrize("file", ["preview_dit.safetensors", "preview_autoencoder.safetensors", "preview_speech.safetensors"])
def test_weights_of_another_shape_name_the_tensor(file, sentence, weights, inputs):
    shutil.copytree(weights, inputs / "weights")
    tensors = load_file(weights / file)
    name = next(name for name, tensor in tensors.items() if tensor.ndim >= 2)
    save_file({**tensors, name: torch.zeros(7, 7)}, inputs / "weights" / file)
    output = sentence(f"weights={inputs / 'weights'}", *FACE, *TINY)
    assert name in output and "[7, 7]" in output


def test_missing_weights_are_named(sentence, inputs):
    assert "does not exist" in sentence(f"weights={inputs / 'nowhere'}", *FACE, *TINY)
    assert "preview_autoencoder.safetensors" in sentence(f"weights={inputs}", *FACE, *TINY)


@pytest.mark.parametrize("model", ["wan_s2v_14b", "live_avatar_14b"])
def test_a_published_model_says_which_checkpoint_it_needs(model, sentence):
    assert "checkpoint=FOLDER" in sentence(f"model={model}")


@pytest.mark.parametrize("model", ["wan_s2v_14b", "live_avatar_14b"])
@pytest.mark.parametrize("typed", ["face.box=[9,9,50,50]", "face.mouth=[9,9,5]", "face.expand_ratio=0.2", "motion.head=gentle"])
def test_a_published_model_refuses_options_of_the_preview(model, typed, sentence):
    output = sentence(f"model={model}", typed)
    assert output.startswith(typed.partition("=")[0]) and "use model=preview" in output


@pytest.mark.parametrize("typed", ["motion.pose=a.mp4", "face.masks=[a.png]", "video.compat=upstream"])
def test_the_preview_refuses_options_of_published_models(typed, sentence):
    output = sentence(typed)
    assert output.startswith(typed.partition("=")[0]) and "use a published model" in output


@pytest.mark.parametrize("typed", ["model.lora.path=folder", "model.lora.alpha=3", "checkpoint=folder"])
def test_a_conversion_refuses_options_that_it_does_not_use(typed, capsys):
    given = ["source=a", "output=b", "model=wan_s2v_14b", typed]
    assert run_command(convert_command.ENTRY, convert_command.convert, given) == 2
    assert "is not read by a conversion; write " in capsys.readouterr().err


@pytest.mark.parametrize(
    "typed", ["preset=fast_previw", "video.size=1x1", "video.size=abc", "sampler.sample_steps=0", "video.infer_frames=-1"]
)
def test_impossible_options_are_refused(typed, sentence):
    assert typed.partition("=")[0] in sentence(typed)


def test_a_face_box_outside_the_photo_is_refused(sentence):
    assert "face_box" in sentence("face_box=[900,900,50,50]")


def test_more_ranks_than_a_job_can_use_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_command(Entry("judge", JudgeConfig, collections=()), lambda config, run: None, ["mp4=a.mp4"]) == 2
    assert "2 ranks" in capsys.readouterr().err


def test_every_rank_reports_its_own_error_with_its_number(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert run_command(infer_command.ENTRY, infer_command.infer, ["image=nowhere.jpg"]) == 2
    assert "rank 1" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["preview", "live_avatar_14b", "wan_s2v_14b"])
@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["duration=-1"], "video.duration=-1.0 must be 0 (as long as the recording) or lie between 0.2 and 86400 s"),
        (["duration=0.1"], "video.duration=0.1 must be 0"),
        (["duration_policy=cut"], "video.duration_policy=cut is unknown; choose one of: follow, strict, trim, pad"),
        (["duration=15", "video.num_clip=1", "video.infer_frames=12"], "is longer than the 0."),
        (["min_resolution=200"], "video.min_resolution=200 must be 0 (off) or an even number between 384 and 2160"),
        (["min_resolution=2162"], "video.min_resolution=2162 must be"),
        (["min_resolution=501"], "video.min_resolution=501 must be"),
        (["expand_ratio=-0.1"], "face.expand_ratio=-0.1 must lie between 0 and 1: it is the margin around the face box on every side"),
        (["expand_ratio=1.6"], "a crop of 1.6 sides of the box is face.expand_ratio=0.3"),
        (["expand_ratio=4"], "face.expand_ratio=4.0 must lie between 0 and 1"),
    ],
)
def test_values_outside_the_range_of_length_size_and_crop_are_refused(model, typed, words, sentence):
    assert words in sentence(f"model={model}", *typed)


def test_a_duration_does_not_go_with_the_clips_of_the_published_pipelines(sentence):
    assert "whose videos are whole clips; leave one out" in sentence("model=wan_s2v_14b", "compat=upstream", "duration=3")
