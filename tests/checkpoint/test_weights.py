"""Weights on disk: official names in both directions, the exact published 14B, and errors that name the tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from run_files import save_weights
from safetensors.torch import load_file, save_file
from tiny import tiny_config, tiny_model
from torch.testing import assert_close

from sonic.checkpoint.weights import OFFICIAL, OURS, export, load_weights, to_official, to_ours
from sonic.config import AudioConfig, ModelConfig, TextConfig, TrunkConfig
from sonic.model.dit import AvatarDiT

KEYS = Path(__file__).parent / "wan_s2v_14b_keys.txt"


def published_config() -> ModelConfig:
    """The sizes of the published 14B model."""
    return ModelConfig(
        name="wan_s2v_14b",
        trunk=TrunkConfig(hidden_dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, patch_size=[1, 2, 2]),
        audio=AudioConfig(audio_dim=1024, num_audio_layers=25, inject_layers=[0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39]),
        text=TextConfig(text_dim=4096, text_len=512),
    )


@pytest.fixture(scope="module")
def published() -> AvatarDiT:
    with torch.device("meta"):
        return AvatarDiT(published_config())


def test_the_14b_has_exactly_the_published_number_of_parameters(published):
    assert sum(weight.numel() for weight in published.parameters()) == 16_295_755_609


def test_the_14b_exports_exactly_the_published_names_and_shapes(published):
    listed = dict(line.split("\t") for line in KEYS.read_text().splitlines())
    assert {name: str(list(tensor.shape)) for name, tensor in export(published).items()} == listed
    assert len(listed) == 1260


def test_names_go_both_ways(published):
    assert len(OFFICIAL) == len(OURS)
    for name in published.state_dict():
        assert to_ours(to_official(name)) == name


def test_a_saved_model_loads_as_it_was(tmp_path):
    model, other = tiny_model(), AvatarDiT(tiny_config())
    save_weights(model, tmp_path / "weights.safetensors", {"made": "by a test"})
    load_weights(other, tmp_path / "weights.safetensors")
    for name, tensor in model.state_dict().items():
        assert_close(other.state_dict()[name], tensor, atol=0, rtol=0)


def test_a_module_without_official_names_keeps_its_own(tmp_path):
    save_weights(torch.nn.Linear(2, 3), tmp_path / "linear.safetensors")
    assert set(load_file(tmp_path / "linear.safetensors")) == {"weight", "bias"}
    load_weights(torch.nn.Linear(2, 3), tmp_path / "linear.safetensors")


@pytest.fixture
def spoiled(tmp_path):
    """A saved tiny model, to be spoiled by a function of its tensors."""

    def spoil(change) -> Path:
        tensors = {name: tensor.clone() for name, tensor in export(tiny_model()).items()}
        change(tensors)
        save_file(tensors, tmp_path / "spoiled.safetensors")
        return tmp_path / "spoiled.safetensors"

    return spoil


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("blocks.1.ffn.0.weight"), r"tensor blocks\.1\.ffn\.0\.weight of the model is missing"),
        (
            lambda tensors: tensors.update({"head.head.bias": torch.zeros(3)}),
            r"tensor head\.head\.bias has shape \[3\], the model needs \[64\]",
        ),
        (lambda tensors: tensors.update(stranger=torch.zeros(1)), "tensor stranger has no place"),
    ],
)
def test_a_file_of_another_model_names_the_tensor_and_leaves_the_model_alone(spoiled, change, message):
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_weights(model, spoiled(change))
    for name, tensor in model.state_dict().items():
        assert_close(tensor, before[name], atol=0, rtol=0)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_reported_to_be_cut_short(spoiled, share):
    path = spoiled(lambda tensors: None)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match="cut short") as caught:
        load_weights(tiny_model(), path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere.safetensors do not exist"):
        load_weights(tiny_model(), tmp_path / "nowhere.safetensors")
