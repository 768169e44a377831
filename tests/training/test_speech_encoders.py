"""A model of another speech encoder: its clips, a training on them, and videos of what was trained, of recordings and of live sound."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from infer_command import FACE, TINY, babble, write_files
from official_folder import write_official
from run_files import read_scalars
from speech_folders import LAYERS, WIDTH, write_speech_folder
from video_files import read_frames

from sonic import AvatarPipeline
from sonic.checkpoint.convert import DIRECTIONS
from sonic.checkpoint.convert_config import ConvertConfig
from sonic.checkpoint.speech_weights import open_speech_encoder
from sonic.cli import Entry, compose, run_command
from sonic.commands import infer_command
from sonic.data.clips import ClipDataset, read_index
from sonic.data.data_config import PrecomputeConfig
from sonic.data.precompute import precompute
from sonic.training.build import run_training
from sonic.training.clip_encoders import build_encoders, clip_hashes
from sonic.training.objective_config import OBJECTIVE_CONFIGS
from sonic.training.train_config import TrainConfig

TRAIN = Entry("train", TrainConfig, collections=("train", "distill"), variants={"objective": OBJECTIVE_CONFIGS})
FITS = (f"model.audio.num_audio_layers={LAYERS}", f"model.audio.audio_dim={WIDTH}")
MODEL = tuple(item for item in TINY if item.startswith("model."))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny preview, a portrait and a recording, and two speech encoders of other kinds."""
    root = write_files(tmp_path_factory.mktemp("speech"), 1.0)
    for name in ("hubert", "whisper"):
        write_speech_folder(root / name, name)
    return root


def chosen(folder: Path, name: str) -> tuple[str, ...]:
    return (*FITS, f"model.speech_encoder={name}", f"model.speech_weights={folder / name}")


def clips_of(folder: Path, name: str, *argv: str) -> PrecomputeConfig:
    made = (*MODEL, f"folder={folder / name}_clips", "utterances=1", "clips_per_utterance=2")
    return compose(Entry("precompute", PrecomputeConfig), [*made, "latent_frames=3", "workers=0", "mix.silent=0", *argv])


@pytest.mark.parametrize("name", ["hubert", "whisper"])
def test_a_preview_of_another_speech_encoder_is_trained_and_generates_videos(folder, tmp_path, name):
    pytest.importorskip("espeakng_loader")
    config = clips_of(folder, name, *chosen(folder, name))
    assert precompute(config, build_encoders, clip_hashes) == 2
    data = ClipDataset(config.folder, 3)
    assert data[0, 0]["audio"].shape == (LAYERS, WIDTH, 12) and data[0, 0]["audio"].abs().amax((1, 2)).min() > 0.1
    assert read_index(Path(config.folder))["speech_hash"] == clip_hashes(config)["speech_hash"] != ""

    settings = ["objective=flow_match", f"data.folder={config.folder}", "data.source=clips", "data.window=3", "budget.max_steps=2"]
    settings += ["budget.batch_size=2", "log.bar=false", "speed.workers=0", *MODEL, f"export={tmp_path}/dit.safetensors"]
    assert run_training(compose(TRAIN, [*settings, *chosen(folder, name)]), tmp_path / "run").steps == 2
    assert read_scalars(tmp_path / "run")[-1]["student/loss"] > 0
    with pytest.raises(ValueError, match="clips of another speech encoder"):
        run_training(compose(TRAIN, [*settings, *chosen(folder, {"hubert": "whisper", "whisper": "hubert"}[name])]), tmp_path / "other")

    argv = [
        *TINY,
        *FACE,
        *chosen(folder, name),
        f"weights={tmp_path / 'dit.safetensors'}",
        f"run.folder={tmp_path / 'runs'}",
        "run.threads=1",
    ]
    paths = [f"image={folder / 'me.png'}", f"audio={folder / 'me.wav'}", f"output={tmp_path / 'me.mp4'}"]
    assert run_command(infer_command.ENTRY, infer_command.infer, [*argv, *paths]) == 0
    assert sum(1 for _ in read_frames(tmp_path / "me.mp4")) == 25
    pipe = AvatarPipeline.from_pretrained("preview", **dict(item.split("=", 1) for item in argv[:-2]))
    sound = babble(1.5)
    live = [np.asarray(chunk.pixels) for chunk in pipe.stream(folder / "me.png", ((part, 16_000) for part in np.split(sound, 3)))]
    assert sum(map(len, live)) == 38 and pipe.look_ahead_s == 1.0


def test_a_speech_encoder_that_does_not_fit_ends_the_command_with_one_sentence(folder, tmp_path, capfd):
    argv = [*TINY, *FACE, f"weights={folder / 'weights'}", "model.speech_encoder=hubert", f"run.folder={tmp_path / 'runs'}"]
    paths = [f"image={folder / 'me.png'}", f"audio={folder / 'me.wav'}", f"output={tmp_path / 'me.mp4'}"]
    for more, sentence in (
        ([], "has no weights of speech_encoder=hubert"),
        ([f"model.speech_weights={folder / 'hubert'}"], "of width 16, "),
    ):
        assert run_command(infer_command.ENTRY, infer_command.infer, [*argv, *paths, *more]) == 2
        assert sentence in capfd.readouterr().err
    assert not (tmp_path / "me.mp4").exists()


@pytest.fixture(scope="module")
def converted(folder):
    """A tiny published model whose checkpoint has a wav2vec2."""
    write_official(folder / "official")
    made = compose(
        Entry("convert", ConvertConfig, collections=()), ["model=wan_s2v_14b", f"source={folder / 'official'}", f"output={folder / 'wan'}"]
    )
    return DIRECTIONS[made.to](made, made.model)


@pytest.mark.parametrize("name", ["hubert", "whisper"])
def test_a_published_model_generates_a_video_with_another_speech_encoder_of_the_same_size(folder, converted, tmp_path, name):
    argv = ["model=wan_s2v_14b", f"checkpoint={converted}", f"image={folder / 'me.png'}", f"audio={folder / 'me.wav'}", "video.size=64x64"]
    argv += ["sampler.sample_steps=1", "video.infer_frames=8", "video.num_clip=1", "device=cpu", "run.threads=1", "run.dtype=float32"]
    frames = {}
    for kind, more in (("own", []), (name, chosen(folder, name)[2:])):
        paths = [f"output={tmp_path / kind}.mp4", f"run.folder={tmp_path / 'runs'}", f"run.name={kind}"]
        assert run_command(infer_command.ENTRY, infer_command.infer, [*argv, *paths, *more]) == 0
        frames[kind] = np.stack(list(read_frames(tmp_path / f"{kind}.mp4")))
    assert len(frames[name]) == 8 and not np.array_equal(frames["own"], frames[name])


def test_clips_of_a_published_model_have_the_features_of_the_chosen_encoder(folder, converted):
    argv = ["model=wan_s2v_14b", f"checkpoint={converted}", f"data.source={folder}", "data.size=64x64"]
    own = compose(Entry("precompute", PrecomputeConfig), argv)
    config = compose(Entry("precompute", PrecomputeConfig), [*argv, *chosen(folder, "hubert")[2:]])
    found = build_encoders(config).encode_audio(babble(2.0), 32)
    model = replace(config.model, audio=replace(config.model.audio, audio_dim=WIDTH, num_audio_layers=LAYERS))
    assert torch.equal(found, open_speech_encoder(model, {})(torch.device("cpu")).encode_audio(babble(2.0), 32, 16))
    assert found.shape == (LAYERS, WIDTH, 32) and found.abs().amax((0, 1)).min() > 0.1
    ours, theirs = clip_hashes(own), clip_hashes(config)
    assert ours["autoencoder_hash"] == theirs["autoencoder_hash"] != "" and "" != ours["speech_hash"] != theirs["speech_hash"] != ""
    same = replace(own.model, speech_weights=str(folder / "official/wav2vec2-large-xlsr-53-english"))  # from which it was converted
    assert clip_hashes(replace(own, model=same)) == ours
