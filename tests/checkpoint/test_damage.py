"""Every kind of damage to a download is reported in one sentence with file and tensor, exit code 2, and no files are left."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_command import convert, infer
from official_folder import UMT5, write_text_encoder
from safetensors.torch import load_file, save_file

from sonic.checkpoint import official
from sonic.checkpoint.lora import PUBLISHED as LORA_FILE

Damage = Callable[[Path], tuple[str, ...]]  # damages a folder and gives the words that the error must contain
TENSOR = "blocks.0.modulation"
SPEECH_FILE = f"{official.SPEECH}/model.safetensors"
SPEECH_TENSOR = "wav2vec2.encoder.layers.0.attention.k_proj.bias"
INDEX = f"{official.DIT_STEM}.safetensors.index.json"


class Code:
    def __reduce__(self):
        return (sys.exit, (7,))


def code_in(name: str, write: Callable[[Any, Path], None]) -> Damage:
    def damage(folder: Path) -> tuple[str, ...]:
        write({"conv1.weight": Code()}, folder / name)
        return name, "no code in it was run"

    return damage


def plain_pickle(value: Any, file: Path) -> None:
    file.write_bytes(pickle.dumps(value))


def first_shard(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def changed(change: Callable[[dict], Any], *words: str, name: str = "", tensor: str = TENSOR) -> Damage:
    """Damage to the tensors of a safetensors file, by default the transformer's first shard."""

    def damage(folder: Path) -> tuple[str, ...]:
        file = folder / name if name else first_shard(folder)
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
        return file.name, tensor, *words

    return damage


def changed_pickle(name: str, change: Callable[[dict, str], dict], *words: str) -> Damage:
    """Damage to one tensor of a .pth file."""

    def damage(folder: Path) -> tuple[str, ...]:
        tensors = torch.load(folder / name, weights_only=True)
        chosen = min(tensor for tensor in tensors if tensor.endswith((".q.weight", "residual.6.weight")))
        torch.save(change(tensors, chosen), folder / name)
        return name, *(words or [chosen])

    return damage


def cut(name: str, kept: int, *words: str) -> Damage:
    def damage(folder: Path) -> tuple[str, ...]:
        file = folder / name if name else first_shard(folder)
        file.write_bytes(file.read_bytes()[:kept])
        return file.name, *words

    return damage


def missing(name: str, *words: str) -> Damage:
    def damage(folder: Path) -> tuple[str, ...]:
        file = folder / name if name else first_shard(folder)
        file.unlink()
        return file.name, *words

    return damage


def edited(name: str, change: Callable[[dict], Any], *words: str) -> Damage:
    """Damage to the content of a JSON file."""

    def damage(folder: Path) -> tuple[str, ...]:
        output = json.loads((folder / name).read_text())
        change(output)
        (folder / name).write_text(json.dumps(output))
        return words

    return damage


def without(held: dict, name: str) -> dict:
    return {key: value for key, value in held.items() if key != name}


DAMAGE: dict[str, Damage] = {
    "missing shard": missing("", "for tensor "),
    "truncated shard": cut("", -100, "tensor ", "more are not all there"),
    "shard cut in its header": cut("", 50),
    "empty shard": cut("", 0),
    "wrong dtype": changed(lambda held: held.update({TENSOR: torch.zeros(1, 6, 48, dtype=torch.int8)}), "I8"),
    "another precision": changed(lambda held: held.update({TENSOR: held[TENSOR].float()}), "F32"),
    "shape off by one": changed(lambda held: held.update({TENSOR: torch.zeros(1, 6, 49)}), "[1, 6, 49]", "[1, 6, 48]"),
    "extra tensor": changed(lambda held: held.update({"blocks.0.surprise": torch.zeros(3)}), tensor="blocks.0.surprise"),
    "missing tensor": changed(lambda held: held.pop(TENSOR)),
    "index of no file": edited(
        INDEX, lambda output: output["weight_map"].update({TENSOR: "nowhere.safetensors"}), INDEX, "nowhere", TENSOR
    ),
    "index without tensors": edited(INDEX, lambda output: output.pop("weight_map"), INDEX),
    "index cut off": cut(INDEX, 40),
    "config missing": missing("config.json"),
    "config cut off": cut("config.json", 40),
    "config of another size": edited("config.json", lambda output: output.update(ffn_dim=65), "blocks.0.ffn.0", "shape"),
    "config of another network": edited("config.json", lambda output: output.update(enable_adain=False), "config.json", "enable_adain"),
    "text tensor missing": changed_pickle(official.TEXT_FILE, without),
    "text tensor off by one": changed_pickle(official.TEXT_FILE, lambda held, name: {**held, name: held[name][:, 1:].clone()}),
    "text tensor too many": changed_pickle(official.TEXT_FILE, lambda held, name: {**held, "surprise": held[name]}, "surprise"),
    "text file missing": missing(official.TEXT_FILE),
    "text file with code": code_in(official.TEXT_FILE, torch.save),
    "text file cut off": cut(official.TEXT_FILE, -100),
    "text file empty": cut(official.TEXT_FILE, 0),
    "vae tensor missing": changed_pickle(official.VAE_FILE, without, "of the VAE is missing"),
    "vae tensor in another precision": changed_pickle(official.VAE_FILE, lambda held, name: {**held, name: held[name].half()}),
    "vae of whole numbers": changed_pickle(official.VAE_FILE, lambda held, name: {**held, name: held[name].int()}),
    "vae cut off": cut(official.VAE_FILE, -100),
    "vae with code": code_in(official.VAE_FILE, plain_pickle),
    "speech tensor off by one": changed(
        lambda held: held.update({SPEECH_TENSOR: torch.zeros(17)}), "[17]", name=SPEECH_FILE, tensor=SPEECH_TENSOR
    ),
    "speech file cut off": cut(SPEECH_FILE, -100, "more are not all there"),
    "tokenizer missing": missing(f"{official.TOKENIZER}/tokenizer.json"),
}


@pytest.fixture
def refused(tmp_path, capfd) -> Callable[..., str]:
    """Runs a conversion that must fail and gives its error, after checking that no files were added."""

    def run(*argv: str) -> str:
        before = sorted(tmp_path.iterdir())
        assert convert(*argv, f"output={tmp_path / 'out'}") == 2
        output = capfd.readouterr().err
        assert [line.startswith("sonic: error") for line in output.splitlines()].count(True) == 1
        assert "Traceback" not in output
        assert sorted(tmp_path.iterdir()) == before
        return output

    return run


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_reported_in_one_sentence_and_nothing_is_left(downloads, tmp_path, refused, kind):
    folder = shutil.copytree(downloads / "Wan2.2-S2V-14B", tmp_path / "source")
    words = DAMAGE[kind](folder)
    output = refused(f"source={folder}", "model=wan_s2v_14b")
    assert all(word in output for word in words), output


def test_networks_that_do_not_belong_together_are_refused(downloads, tmp_path, refused):
    folder = shutil.copytree(downloads / "Wan2.2-S2V-14B", tmp_path / "source")
    write_text_encoder(folder / official.TEXT_FILE, {**UMT5, "d_model": 32})
    output = refused(f"source={folder}", "model=wan_s2v_14b")
    assert official.TEXT_FILE in output and "width 32, the transformer reads 24" in output


@pytest.mark.parametrize("change", ["nothing fits", "half a pair", "cut off", "another rank", "another shape"])
def test_an_adapter_that_does_not_fit_is_refused(downloads, tmp_path, refused, change):
    folder = shutil.copytree(downloads / "LiveAvatar", tmp_path / "lora")
    file = folder / LORA_FILE
    tensors, module = load_file(file), "blocks.0.ffn.0"
    down, up = (f"{module}.lora_{half}.weight" for half in "AB")
    if change == "half a pair":
        tensors.pop(up)
    elif change == "nothing fits":
        tensors = {f"other.{name}": tensor for name, tensor in tensors.items()}
    elif change == "another rank":
        tensors[down] = torch.zeros(3, tensors[down].shape[1])
    elif change == "another shape":
        tensors[up] = torch.zeros(63, tensors[up].shape[1])
    save_file(tensors, file)
    if change == "cut off":
        file.write_bytes(file.read_bytes()[:-100])
    output = refused(f"source={downloads / 'Wan2.2-S2V-14B'}", f"live_avatar={folder}")
    names = {"nothing fits": "other.blocks", "cut off": LORA_FILE, "another shape": "blocks.0.mlp_in"}
    assert names.get(change, module) in output


@pytest.mark.parametrize("component", ["dit", "text_encoder", "vae", "speech_encoder"])
def test_a_damaged_ready_checkpoint_is_reported_before_anything_is_written(ready, tmp_path, capfd, component):
    folder = shutil.copytree(ready / "live", tmp_path / "live")
    shutil.rmtree(folder / "prompts", ignore_errors=True)
    file = min((folder / component).glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    argv = ["model=live_avatar_14b", f"checkpoint={folder}", f"audio={ready / 'speech.wav'}", "video.size=64x64", "prompt=calm"]
    assert infer(tmp_path, *argv, f"output={tmp_path / 'a.mp4'}") == 2
    output = capfd.readouterr().err
    assert file.name in output and component in output and "Traceback" not in output
    assert [path.name for path in tmp_path.iterdir()] == ["live"]
