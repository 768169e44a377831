"""Every kind of damage to a download: one sentence with file and tensor, exit code 2, and nothing left."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conversion import convert
from safetensors.torch import load_file, save_file

from sonic.checkpoint import official


class Code:
    def __reduce__(self):
        return (sys.exit, (7,))


def _pickled_code(folder: Path) -> str:
    (folder / official.VAE_FILE).write_bytes(pickle.dumps(Code()))
    return official.VAE_FILE


def _changed(change):
    """Damage to one shard of the transformer: `change` gets its tensors."""

    def damage(folder: Path) -> str:
        file = sorted(folder.glob("*.safetensors"))[0]
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
        return file.name

    return damage


def _truncated(folder: Path) -> str:
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-100])
    return file.name


def _missing_shard(folder: Path) -> str:
    file = sorted(folder.glob("*.safetensors"))[0]
    file.unlink()
    return file.name


def _wrong_index(folder: Path) -> str:
    file = folder / f"{official.DIT_STEM}.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["head.modulation"] = "nowhere.safetensors"
    file.write_text(json.dumps(index))
    return "nowhere.safetensors"


def _changed_pickle(name: str, change):
    """Damage to one tensor of a .pth file; None takes it out."""

    def damage(folder: Path) -> str:
        tensors = torch.load(folder / name, weights_only=True)
        kept = next(iter(sorted(tensor for tensor in tensors if tensor.endswith(".q.weight") or tensor.endswith("residual.6.weight"))))
        tensors = change(tensors, kept)
        torch.save(tensors, folder / name)
        return kept

    return damage


def _cut_pickle(folder: Path) -> str:
    file = folder / official.VAE_FILE
    file.write_bytes(file.read_bytes()[:-100])
    return official.VAE_FILE


DAMAGE = {
    "text tensor missing": _changed_pickle(official.TEXT_FILE, lambda held, name: {key: held[key] for key in held if key != name}),
    "text tensor off by one": _changed_pickle(official.TEXT_FILE, lambda held, name: {**held, name: held[name][:, 1:].clone()}),
    "vae tensor missing": _changed_pickle(official.VAE_FILE, lambda held, name: {key: held[key] for key in held if key != name}),
    "vae tensor in another precision": _changed_pickle(official.VAE_FILE, lambda held, name: {**held, name: held[name].half()}),
    "pickle cut off": _cut_pickle,
    "another precision": _changed(lambda tensors: tensors.update({"blocks.0.modulation": tensors["blocks.0.modulation"].float()})),
    "missing shard": _missing_shard,
    "truncated shard": _truncated,
    "wrong dtype": _changed(lambda tensors: tensors.update({"blocks.0.modulation": torch.zeros(1, 6, 48, dtype=torch.int8)})),
    "shape off by one": _changed(lambda tensors: tensors.update({"blocks.0.modulation": torch.zeros(1, 6, 49)})),
    "extra tensor": _changed(lambda tensors: tensors.update({"blocks.0.surprise": torch.zeros(3)})),
    "missing tensor": _changed(lambda tensors: tensors.pop("blocks.0.modulation")),
    "pickle with code": _pickled_code,
    "index of no file": _wrong_index,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_told_in_one_sentence_and_nothing_is_left(downloads, tmp_path, capfd, kind):
    folder = shutil.copytree(downloads / "Wan2.2-S2V-14B", tmp_path / "source")
    file = DAMAGE[kind](folder)
    assert convert(f"source={folder}", "model=wan_s2v_14b", f"output={tmp_path / 'out'}") == 2
    said = capfd.readouterr().err
    assert file in said
    assert [line.startswith("sonic: error") for line in said.splitlines()].count(True) == 1
    assert "Traceback" not in said
    if kind not in ("missing shard", "truncated shard", "pickle with code", "pickle cut off"):
        assert "tensor" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
