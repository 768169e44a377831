"""Sharded weights: what is in shards, what is given back after use, and what is gathered ahead."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from tiny import conditions, latents_of, tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from sonic.model.dit import ENTRY_POINTS, AvatarDiT
from sonic.parallel.context import DistributedContext
from sonic.parallel.fsdp import Sharding, prefetch_in_order, shard
from sonic.parallel.mesh import make_world
from sonic.parallel.parallel_config import ParallelConfig
from sonic.parallel.shard_units import TRAINING_ENDS, WHOLE, all_units


@pytest.fixture
def alone() -> Iterator[None]:
    """A group of one rank, for which weights are gathered and given back as for many."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(**settings) -> tuple[AvatarDiT, DistributedContext]:
    model, config = tiny_model().requires_grad_(False), ParallelConfig("fsdp", **settings)
    world = make_world(config, "fsdp", torch.device("cpu"))
    shard(model, world, config)
    return model, DistributedContext(world, config, prefetch_in_order(model, world, config))


@pytest.mark.parametrize("reshard", [True, False])
def test_gathered_weights_are_freed_after_a_video_unless_resharding_is_off(reshard, alone):
    model, context = sharded(reshard=reshard, unshard_unit="block")
    latents_of(model, conditions(4), 2, context=context)
    layers = [*model.blocks.parameters(), *model.audio_injectors.parameters()]
    assert {isinstance(weight, DTensor) for weight in layers} == {reshard}


def test_weights_outside_all_units_are_replicated_on_every_rank(alone):
    model, _ = sharded()
    whole = {name.partition(".")[0] for name, weight in model.named_parameters() if not isinstance(weight, DTensor)}
    assert whole == set(WHOLE)


@pytest.mark.parametrize("depth", [1, 2])
def test_each_unit_prefetches_the_units_that_run_after_it(depth, alone, monkeypatch):
    ahead, ran = {}, []
    set_ahead = FSDPModule.set_modules_to_forward_prefetch

    def recorded(unit: FSDPModule, units: list[FSDPModule]) -> None:
        ahead[unit] = units
        set_ahead(unit, units)

    monkeypatch.setattr(FSDPModule, "set_modules_to_forward_prefetch", recorded)
    model, context = sharded(unshard_unit="block", prefetch=depth)
    layers = [*model.blocks, *model.audio_injectors]
    for layer in layers:
        layer.register_forward_pre_hook(lambda module, args: ran.append(module))
    latents_of(model, conditions(4), 2, context=context)
    last = ran[-len(layers) :]  # the forward of a block of the video, which meets the injectors as well
    assert set(last) == set(layers)
    assert [ahead[unit] for unit in last] == [last[position + 1 : position + 1 + depth] for position in range(len(last))]


def test_a_model_that_trains_in_shards_computes_rollouts_and_clips_in_the_precision_they_are_gathered_in(alone):
    sharded, plain, given = tiny_model(), tiny_model().bfloat16(), conditions(4)
    mesh = init_device_mesh("cpu", (1,))
    precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    Sharding(mesh, precision=precision).apply(sharded, all_units(sharded.config, ends=TRAINING_ENDS), ENTRY_POINTS)
    noise, timestep = torch.randn_like(given.pose), torch.tensor([500.0])
    with torch.no_grad():
        assert torch.equal(latents_of(sharded, given, 2), latents_of(plain, given, 2))
        assert torch.equal(sharded(noise, timestep, given), plain(noise, timestep, given))
    assert {weight.dtype for weight in sharded.blocks.parameters()} == {torch.float32}  # in which they learn
