"""Conversion of miniature downloads of both published models, and export back to official names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from convert_command import convert, infer, tensors_of
from official_folder import GIVEN, tiny_model
from run_files import save_weights
from safetensors.torch import load_file

from sonic.checkpoint import official
from sonic.checkpoint.lora import PUBLISHED as LORA_FILE
from sonic.checkpoint.weights import export
from sonic.model.dit import AvatarDiT


def test_a_converted_checkpoint_records_its_sources(ready):
    manifest = json.loads((ready / "live/manifest.json").read_text())
    assert manifest["model"] == "live_avatar_14b"
    assert manifest["lora"]["weights"] == 2 * 10 + 4
    assert {official.TEXT_FILE, official.VAE_FILE, LORA_FILE, "tokenizer.json"} <= set(manifest["sources"])
    report = json.loads((ready / "live/report.json").read_text())
    assert len(report) == sum(manifest["tensors"].values())
    assert sum(line["merged"] for line in report) == manifest["lora"]["weights"]
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors_of(ready / "live/dit", "model").values())


def test_the_adapter_is_merged_at_half_its_strength_per_rank(ready):
    before, after = (tensors_of(ready / name / "dit", "model") for name in ("wan", "live"))
    lora = load_file(ready / "LiveAvatar" / LORA_FILE)
    name = "blocks.1.self_attn.q"
    delta = 64 / 2 * (lora[f"{name}.lora_B.weight"].float() @ lora[f"{name}.lora_A.weight"].float())
    expected = (before[f"{name}.weight"].float() + delta).bfloat16()
    assert torch.equal(after[f"{name}.weight"], expected)
    assert torch.equal(before["blocks.1.norm3.weight"], after["blocks.1.norm3.weight"])


def test_a_files_own_alpha_and_a_given_one(downloads, tmp_path):
    common = (f"source={downloads / 'Wan2.2-S2V-14B'}", f"lora.path={downloads / 'LiveAvatar' / LORA_FILE}")
    assert convert(*common, "lora.alpha=32", f"output={tmp_path / 'half'}") == 0
    lora = load_file(downloads / "LiveAvatar" / LORA_FILE)
    name = "blocks.1.self_attn.q"
    delta = 32 / 2 * (lora[f"{name}.lora_B.weight"].float() @ lora[f"{name}.lora_A.weight"].float())
    before = tensors_of(downloads / "Wan2.2-S2V-14B", official.DIT_STEM)[f"{name}.weight"]
    assert torch.equal(tensors_of(tmp_path / "half/dit", "model")[f"{name}.weight"], (before.float() + delta).bfloat16())


def test_live_avatar_without_its_adapter_is_refused(downloads, tmp_path, capfd):
    assert convert(f"source={downloads / 'Wan2.2-S2V-14B'}", f"output={tmp_path / 'out'}") == 2
    assert "live_avatar=FOLDER" in capfd.readouterr().err


def beside(folder: Path, source: Path) -> None:
    """Copy the other networks of a download into the folder of a transformer."""
    for file in source.iterdir():
        if file.name != "config.json" and not file.name.startswith(official.DIT_STEM):
            (folder / file.name).symlink_to(file)


def same_tensors(one: Path, other: Path, stem: str) -> bool:
    first, second = tensors_of(one, stem), tensors_of(other, stem)
    equal = [torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8)) for name in first]
    return first.keys() == second.keys() and all(equal)


@pytest.mark.parametrize(("made", "spelling"), [("wan", ["to=official"]), ("live", ["--to", "official"])])
def test_official_and_back_gives_the_same_bytes(ready, tmp_path, made, spelling):
    """For Live Avatar the adapter stays merged, so on the way back the folder is converted as Wan2.2-S2V's is."""
    name = {"wan": "wan_s2v_14b", "live": "live_avatar_14b"}[made]
    assert convert(f"source={ready / made}", f"model={name}", f"output={tmp_path / 'back'}", *spelling) == 0
    if made == "wan":
        assert same_tensors(ready / "Wan2.2-S2V-14B", tmp_path / "back", official.DIT_STEM)
    assert json.loads((tmp_path / "back/config.json").read_text())["dim"] == GIVEN["dim"]
    beside(tmp_path / "back", ready / "Wan2.2-S2V-14B")
    assert convert(f"source={tmp_path / 'back'}", "model=wan_s2v_14b", f"output={tmp_path / 'again'}") == 0
    assert same_tensors(ready / made / "dit", tmp_path / "again/dit", "model")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_student_file_can_be_exported_to_official_names_and_back(downloads, tmp_path, dtype):
    torch.manual_seed(3)
    config = tiny_model()
    student = AvatarDiT(config).to(dtype)
    save_weights(student, tmp_path / "student.safetensors")
    groups = {group: getattr(config, group) for group in ("trunk", "audio", "text")}
    sizes = [f"model.{group}.{name}={value}" for group, options in groups.items() for name, value in vars(options).items()]
    made = [f"source={tmp_path / 'student.safetensors'}", f"output={tmp_path / 'out'}", "model=wan_s2v_14b", "--to", "official"]
    assert convert(*made, *sizes) == 0
    written, expected = tensors_of(tmp_path / "out", official.DIT_STEM), export(student)
    assert written.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) and tensor.dtype == dtype for name, tensor in written.items())
    beside(tmp_path / "out", downloads / "Wan2.2-S2V-14B")
    assert convert(f"source={tmp_path / 'out'}", "model=wan_s2v_14b", f"output={tmp_path / 'ready'}") == 0
    back = tensors_of(tmp_path / "ready/dit", "model")
    assert all(torch.equal(tensor, expected[name].bfloat16()) for name, tensor in back.items())


def test_an_unconverted_folder_is_answered_with_the_conversion_command(downloads, tmp_path, capfd):
    made = ["model=live_avatar_14b", f"audio={downloads / 'speech.wav'}"]
    assert infer(tmp_path, *made, f"checkpoint={downloads / 'Wan2.2-S2V-14B'}") == 2
    assert "sonic convert" in capfd.readouterr().err
    assert infer(tmp_path, *made) == 2
    assert "sonic convert" in capfd.readouterr().err
