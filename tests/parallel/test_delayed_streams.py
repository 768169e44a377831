"""Copies and decoding on streams of their own give the bits of a device that does all work at once, however late the streams are."""

from __future__ import annotations

import pytest
import torch
from delayed_streams import delayed_streams
from tiny import conditions, latents_of, tiny_model

from sonic.parallel.context import DistributedContext
from sonic.parallel.mesh import World
from sonic.parallel.offload import load_before_use
from sonic.parallel.parallel_config import OffloadConfig, ParallelConfig

CPU = torch.device("cpu")
BLOCKS = 4  # of a ring of two


def offloaded_latents(steps: int, scale: float, **options) -> torch.Tensor:
    """Latents of a video by a model whose layers are all offloaded."""
    model, config = tiny_model().requires_grad_(False), ParallelConfig("offload", offload=OffloadConfig(resident_gib=0, **options))
    world = World("offload", CPU)
    context = DistributedContext(world, config, load_before_use(model, world, config))
    return latents_of(model, conditions(2 * BLOCKS), BLOCKS, context=context, sample_steps=steps, sample_guide_scale=scale)


@pytest.mark.parametrize("kv", ["device", "host"])
@pytest.mark.parametrize("inflight", [1, 4])
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_offloaded_layers_and_rings_give_the_bits_of_one_device(slots, inflight, kv):
    steps, scale = 4, 2.0 if inflight == 1 else 1.0
    alone = latents_of(tiny_model(), conditions(2 * BLOCKS), BLOCKS, sample_steps=steps, sample_guide_scale=scale)
    with delayed_streams():
        found = offloaded_latents(steps, scale, slots=slots, inflight=inflight, kv=kv)
    assert torch.equal(found, alone)


def test_the_cache_of_a_video_that_failed_may_be_freed_while_the_next_one_is_made():
    model, config = tiny_model().requires_grad_(False), ParallelConfig("offload", offload=OffloadConfig(resident_gib=0, kv="host"))
    alone, world = latents_of(tiny_model(), conditions(4), 2), World("offload", CPU)
    context = DistributedContext(world, config, load_before_use(model, world, config))
    left = [model.new_cache(conditions(4), steps=2, execution=context.execution)]
    model.blocks[0].self_attention.register_forward_hook(lambda *_: (left.clear() if context.execution.windows.loading else None, None)[1])
    assert torch.equal(latents_of(model, conditions(4), 2, context=context), alone) and not left
