"""Sharded weights: what is in shards, what is given back after use, and what is gathered ahead."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from tiny import conditions, film, tiny_model
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from sonic.model.dit import AvatarDiT
from sonic.parallel.context import DistributedContext
from sonic.parallel.fsdp import prefetch_in_order, shard
from sonic.parallel.mesh import make_world
from sonic.parallel.parallel_config import ParallelConfig
from sonic.parallel.shard_units import WHOLE


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
def test_weights_of_layers_are_given_back_after_a_film_unless_they_are_to_stay(reshard, alone):
    model, context = sharded(reshard=reshard, unshard_unit="block")
    film(model, conditions(4), 2, context=context)
    layers = [*model.blocks.parameters(), *model.audio_injectors.parameters()]
    assert {isinstance(weight, DTensor) for weight in layers} == {reshard}


def test_what_no_unit_gathers_is_whole_on_every_rank(alone):
    model, _ = sharded()
    whole = {name.partition(".")[0] for name, weight in model.named_parameters() if not isinstance(weight, DTensor)}
    assert whole == set(WHOLE)


@pytest.mark.parametrize("depth", [1, 2])
def test_each_unit_gathers_those_that_run_after_it_in_a_pass_of_its_kind(depth, alone, monkeypatch):
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
    film(model, conditions(4), 2, context=context)
    last = ran[-len(layers) :]  # the forward of a block of the film, which meets the injectors as well
    assert set(last) == set(layers)
    assert [ahead[unit] for unit in last] == [last[place + 1 : place + 1 + depth] for place in range(len(last))]
