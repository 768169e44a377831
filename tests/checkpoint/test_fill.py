"""Weights that come into a model without memory: each rank's part, adapters included, is that of the whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from run_files import save_weights
from safetensors.torch import save_file
from tiny import tiny_config, tiny_model
from torch.testing._internal.distributed.fake_pg import FakeStore

from sonic.checkpoint.load import fill, fill_randomly, without_memory
from sonic.checkpoint.lora import NO_LORA, Lora, read_lora
from sonic.checkpoint.weights import load_weights
from sonic.parallel.fsdp import shard
from sonic.parallel.mesh import make_world
from sonic.parallel.parallel_config import ParallelConfig

CPU = torch.device("cpu")
ADAPTED = ("blocks.0.self_attention.to_q.weight", "blocks.2.mlp_in.weight")


@pytest.fixture
def path(tmp_path) -> Path:
    save_weights(tiny_model(), tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"


@pytest.fixture
def lora(rng, tmp_path) -> Lora:
    shapes = {name: tuple(weight.shape) for name, weight in tiny_model().named_parameters()}
    draw = lambda *shape: torch.randn(shape, generator=rng)  # noqa: E731
    halves = {"lora_A": lambda name: draw(2, shapes[name][1]), "lora_B": lambda name: draw(shapes[name][0], 2)}
    tensors = {name.replace("weight", f"{half}.weight"): make(name) for name in ADAPTED for half, make in halves.items()}
    save_file(tensors, tmp_path / "lora.safetensors")
    return read_lora(tmp_path / "lora.safetensors", alpha=3.0)


def merged(path: Path, lora: Lora, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights of one rank: loaded, then adapted."""
    model = tiny_model().to(dtype)
    load_weights(model, path)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, adapter in lora.adapters.items():
            weights[name].copy_(weights[name].float() + adapter.delta(lora.alpha))
    return weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_filled_with_weights_that_are_loaded_and_then_adapted(dtype, path, lora):
    model = without_memory(tiny_config()).to(dtype)
    fill(model.to_empty(device=CPU), path, lora=lora)
    wanted = merged(path, lora, dtype)
    assert {name for name, weight in model.named_parameters() if not torch.equal(weight, wanted[name])} == set()


def test_a_rank_that_has_a_slice_has_its_slice_of_the_adapters(path, lora):
    """One rank only, because torch remembers by the mesh which slice this process has."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=3)
    try:
        model = without_memory(tiny_config())
        config = ParallelConfig("fsdp", unshard_unit="block")
        shard(model, make_world(config, "fsdp", CPU), config)
        fill(model.to_empty(device=CPU), path, lora=lora)
        wanted = merged(path, lora, torch.float32)
        for name, weight in model.named_parameters():
            mine = weight.to_local() if hasattr(weight, "to_local") else weight
            parts = [*wanted[name].chunk(3), wanted[name][:0]]
            assert torch.equal(mine, wanted[name] if mine is weight else parts[1]), name
    finally:
        dist.destroy_process_group()


def test_adapters_that_find_no_weight_are_refused(path, lora):
    model = without_memory(tiny_config())
    strange = Lora({"blocks.77.mlp_in.weight": lora.adapters[ADAPTED[0]]}, alpha=3.0)
    with pytest.raises(ValueError, match=r"1 of 1 weights that the model lacks: blocks\.77"):
        fill(model.to_empty(device=CPU), path, lora=strange)


def test_weights_that_stay_in_their_file_can_be_neither_adapted_nor_of_another_precision(path, lora):
    wrong = (torch.float32, lora, "needs torch.float32 with lora"), (torch.bfloat16, NO_LORA, "needs torch.bfloat16:")
    for dtype, adapters, message in wrong:
        model = without_memory(tiny_config()).to(dtype)
        with pytest.raises(ValueError, match=f"{message}.*use offload.store=pinned"):
            fill(model, path, lora=adapters)


def test_random_weights_differ_from_each_other():
    model = without_memory(tiny_config())
    fill_randomly(model.to_empty(device=CPU))
    drawn = [weight.flatten()[:8] for weight in model.parameters() if weight.numel() >= 8]
    assert len({tuple(each.tolist()) for each in drawn}) == len(drawn)
