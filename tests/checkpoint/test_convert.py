"""Downloads of both published models, made small, converted, and given back."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conversion import convert, infer, tensors_of
from official_folder import FULL, tiny_model, write_sparse
from safetensors.torch import load_file, save_file

from sonic.app import Entry, compose
from sonic.checkpoint import official
from sonic.checkpoint.convert import SHARD_BYTES, shards_of
from sonic.checkpoint.tensor_files import read
from sonic.infer.settings import InferConfig
from sonic.metrics import peak_rss_gib
from sonic.model.dit import AvatarDiT
from sonic.model.lora import PUBLISHED as LORA_FILE
from sonic.model.weights import export, save_weights


def test_a_ready_checkpoint_says_what_it_was_made_from(ready):
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


@pytest.mark.parametrize("spelling", [["to=official"], ["--to", "official"]])
def test_official_and_back_gives_the_same_bytes(ready, tmp_path, spelling):
    assert convert(f"source={ready / 'wan'}", "model=wan_s2v_14b", f"output={tmp_path / 'back'}", *spelling) == 0
    first = tensors_of(ready / "Wan2.2-S2V-14B", official.DIT_STEM)
    again = tensors_of(tmp_path / "back", official.DIT_STEM)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    for file in ready.joinpath("Wan2.2-S2V-14B").iterdir():
        if file.name not in ("config.json",) and not file.name.startswith(official.DIT_STEM):
            (tmp_path / "back" / file.name).symlink_to(file)
    assert convert(f"source={tmp_path / 'back'}", "model=wan_s2v_14b", f"output={tmp_path / 'again'}") == 0
    before, after = (tensors_of(folder / "dit", "model") for folder in (ready / "wan", tmp_path / "again"))
    assert all(torch.equal(before[name], after[name]) for name in before)


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


def test_a_student_in_a_file_gets_official_names(tmp_path):
    torch.manual_seed(3)
    config = tiny_model()
    student = AvatarDiT(config)
    save_weights(student, tmp_path / "student.safetensors")
    groups = {group: getattr(config, group) for group in ("trunk", "audio", "text")}
    sizes = [f"model.{group}.{name}={value}" for group, knobs in groups.items() for name, value in vars(knobs).items()]
    made = [f"source={tmp_path / 'student.safetensors'}", f"output={tmp_path / 'out'}", "model=wan_s2v_14b", "--to", "official"]
    assert convert(*made, *sizes) == 0
    assert all(torch.equal(tensor, export(student)[name]) for name, tensor in tensors_of(tmp_path / "out", official.DIT_STEM).items())
    assert json.loads((tmp_path / "out/config.json").read_text())["dim"] == config.trunk.hidden_dim


@pytest.mark.parametrize("change", ["nothing fits", "half a pair"])
def test_an_adapter_that_does_not_fit_is_refused(downloads, tmp_path, capfd, change):
    folder = shutil.copytree(downloads / "LiveAvatar", tmp_path / "lora")
    tensors = load_file(folder / LORA_FILE)
    if change == "half a pair":
        tensors.pop("blocks.0.ffn.0.lora_B.weight")
    else:
        tensors = {f"other.{name}": tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / LORA_FILE)
    assert convert(f"source={downloads / 'Wan2.2-S2V-14B'}", f"live_avatar={folder}", f"output={tmp_path / 'out'}") == 2
    said = capfd.readouterr().err
    assert ("blocks.0.ffn.0" in said) if change == "half a pair" else ("other.blocks" in said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora"]


def test_a_conversion_that_is_cut_off_starts_over(downloads, tmp_path):
    (tmp_path / "out.partial/dit").mkdir(parents=True)
    (tmp_path / "out.partial/dit/old.safetensors").write_bytes(b"half")
    assert convert(f"source={downloads / 'Wan2.2-S2V-14B'}", "model=wan_s2v_14b", f"output={tmp_path / 'out'}") == 0
    assert not (tmp_path / "out.partial").exists()
    assert not (tmp_path / "out/dit/old.safetensors").exists()


def test_a_folder_that_is_not_ready_says_how_to_make_one(downloads, tmp_path, capfd):
    made = ["model=live_avatar_14b", f"audio={downloads / 'speech.wav'}"]
    assert infer(tmp_path, *made, f"checkpoint={downloads / 'Wan2.2-S2V-14B'}") == 2
    assert "launch/convert.py" in capfd.readouterr().err
    assert infer(tmp_path, *made) == 2
    assert "launch/convert.py" in capfd.readouterr().err


def test_the_full_name_list_is_checked_and_portioned_without_being_held(tmp_path):
    """Sparse files of 32 GB that take no disk: headers are read, contents are not."""
    config = compose(Entry("infer", InferConfig), ["model=wan_s2v_14b"]).model
    with torch.device("meta"):
        tensors = export(AvatarDiT(config))
    (tmp_path / "config.json").write_text(json.dumps(FULL))
    write_sparse(tensors, tmp_path, shards=4)
    before = peak_rss_gib()
    part, found = official.transformer(tmp_path, config)
    assert (len(part.tensors), found) == (1260, config)
    portions = [sum(stored.numel * 2 for stored in shard.values()) for shard in shards_of(part)]
    assert sum(portions) == 2 * 16_295_755_609
    assert max(portions) <= SHARD_BYTES
    first = next(iter(shards_of(part)))
    assert all(not tensor.any() for _, tensor in read(first.values()))
    assert peak_rss_gib() - before < 2.5
