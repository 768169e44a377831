"""Adapters: whatever the naming of their keys, they are merged completely or not at all."""

from __future__ import annotations

import pytest
import torch
from run_files import save_weights
from safetensors.torch import save_file
from tiny import tiny_model
from torch.testing import assert_close

from sonic.checkpoint.load import fill
from sonic.checkpoint.lora import ALPHA as STORED_ALPHA
from sonic.checkpoint.lora import USUAL_ALPHA, read_lora

RANK, ALPHA = 2, 6.0
MODULE = "blocks.0.self_attn.q"


def pair(model, module=MODULE, *, pattern="{module}.{role}.weight"):
    dim = model.config.trunk.hidden_dim
    halves = {"lora_A": torch.randn(RANK, dim), "lora_B": torch.randn(dim, RANK)}
    return {pattern.format(module=module, role=role): tensor for role, tensor in halves.items()}


def merge_lora(model, folder):
    """Fill the model with its own weights and the adapter in `folder`."""
    save_weights(model, folder / "weights.safetensors")
    fill(model, folder / "weights.safetensors", lora=read_lora(folder / "lora.safetensors", ALPHA))


@pytest.mark.parametrize(
    "pattern",
    [
        "{module}.{role}.weight",
        "{module}.{role}.default.weight",
        "base_model.model.{module}.{role}.weight",
        "base_model.model.{module}.{role}.default.weight",
    ],
)
@pytest.mark.parametrize("module", [MODULE, "blocks.0.self_attention.to_q"])
@torch.no_grad()
def test_every_spelling_of_a_key_is_merged(pattern, module, tmp_path):
    model = tiny_model()
    tensors = pair(model, module, pattern=pattern)
    save_file(tensors, tmp_path / "lora.safetensors")
    before, other = model.blocks[0].self_attention.to_q.weight.clone(), model.blocks[0].self_attention.to_k.weight.clone()
    merge_lora(model, tmp_path)
    down, up = tensors.values()
    assert_close(model.blocks[0].self_attention.to_q.weight, before + ALPHA / RANK * up @ down)
    assert torch.equal(model.blocks[0].self_attention.to_k.weight, other)


@torch.no_grad()
def test_a_weight_in_bfloat16_is_rounded_once_after_it_is_merged(tmp_path):
    model = tiny_model().bfloat16()
    tensors = {name: tensor.bfloat16() for name, tensor in pair(model).items()}
    save_file(tensors, tmp_path / "lora.safetensors")
    weight = model.blocks[0].self_attention.to_q.weight
    down, up = (tensor.float() for tensor in tensors.values())
    expected = (weight.float() + ALPHA / RANK * up @ down).bfloat16()
    merge_lora(model, tmp_path)
    assert torch.equal(weight, expected)


@pytest.mark.parametrize(("stored", "alpha"), [({STORED_ALPHA: "12"}, 12.0), ({}, USUAL_ALPHA), (None, USUAL_ALPHA)])
def test_the_strength_is_the_one_that_the_file_states_or_the_usual_one(stored, alpha, tmp_path):
    save_file(pair(tiny_model()), tmp_path / "lora.safetensors", metadata=stored)
    assert read_lora(tmp_path / "lora.safetensors").alpha == alpha


def test_a_lora_of_another_model_changes_nothing_and_names_the_tensors_that_do_not_fit(tmp_path):
    model = tiny_model()
    save_file({**pair(model), **pair(model, "blocks.77.self_attn.q")}, tmp_path / "lora.safetensors")
    before = model.blocks[0].self_attention.to_q.weight.clone()
    with pytest.raises(ValueError, match=r"1 of 2 .*blocks\.77"):
        merge_lora(model, tmp_path)
    assert torch.equal(model.blocks[0].self_attention.to_q.weight, before)


def test_a_lora_of_another_width_names_both_shapes(tmp_path):
    model = tiny_model()
    save_file(
        {f"{MODULE}.lora_A.weight": torch.zeros(RANK, 7), f"{MODULE}.lora_B.weight": torch.zeros(5, RANK)}, tmp_path / "lora.safetensors"
    )
    with pytest.raises(ValueError, match=r"\[5, 7\]"):
        merge_lora(model, tmp_path)


@pytest.mark.parametrize("left_over", [{"something.else": torch.zeros(1)}, {"blocks.1.self_attn.q.lora_A.weight": torch.zeros(2, 4)}])
def test_an_adapter_matrix_without_its_partner_is_named(left_over, tmp_path):
    save_file({**pair(tiny_model()), **left_over}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=next(iter(left_over)).rsplit(".lora", 1)[0]):
        read_lora(tmp_path / "lora.safetensors")


def test_adapter_matrices_of_different_ranks_are_refused(tmp_path):
    first, second = pair(tiny_model()).values()
    save_file({f"{MODULE}.lora_A.weight": first, f"{MODULE}.lora_B.weight": second[:, :1].clone()}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=f"no whole pair of lora_A and lora_B for: {MODULE}"):
        read_lora(tmp_path / "lora.safetensors")


@pytest.mark.parametrize(
    ("pattern", "module"),
    [
        ("base_model.model.{module}.{role}.weight", MODULE),
        ("{module}.{role}.second.weight", MODULE),
        ("{module}.{role}.weight", "blocks.0.self_attention.to_q"),
    ],
)
def test_two_adapters_of_one_weight_are_both_named(pattern, module, tmp_path):
    model = tiny_model()
    again = pair(model, module, pattern=pattern)
    save_file({**pair(model), **again}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="both for blocks.0.self_attention.to_q.weight") as caught:
        read_lora(tmp_path / "lora.safetensors")
    assert any(name in str(caught.value) for name in again) and any(name in str(caught.value) for name in pair(model))


def test_a_missing_or_truncated_adapter_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_lora(tmp_path / "lora.safetensors")
    (tmp_path / "lora.safetensors").write_bytes(b"123")
    with pytest.raises(ValueError, match="cut short or not safetensors"):
        read_lora(tmp_path / "lora.safetensors")
