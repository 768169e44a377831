"""How each plan shards a model before its weights are loaded, where it allocates them, and how the model then runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name
from typing import NamedTuple

import torch

from sonic.checkpoint.load import fill, fill_randomly, shapes_of, without_memory
from sonic.checkpoint.lora import Lora
from sonic.config import ModelConfig
from sonic.model.dit import AvatarDiT
from sonic.model.execution import LOCAL, Execution
from sonic.parallel.context import DistributedContext
from sonic.parallel.deepspeed_inference import allocate_slices, start_engines
from sonic.parallel.fsdp import prefetch_in_order, shard
from sonic.parallel.layer_pipeline import keep_range, layer_ranges, pipeline_channel
from sonic.parallel.mesh import World
from sonic.parallel.offload import allocate_layers, load_before_use
from sonic.parallel.parallel_config import PLANS, ParallelConfig
from sonic.parallel.shard_units import WHOLE
from sonic.parallel.ulysses import sequence_parallel
from sonic.types import pick

Step = Callable[[AvatarDiT, World, ParallelConfig], None]  # changes the model in place
Start = Callable[[AvatarDiT, World, ParallelConfig], Execution]


def cut_nothing(model: AvatarDiT, world: World, config: ParallelConfig) -> None:
    """Keep the whole model on this rank."""


def allocate_on_device(model: AvatarDiT, world: World, config: ParallelConfig) -> None:
    """Allocate all weights on the device of this rank."""
    model.to_empty(device=world.device)


def run_unchanged(model: AvatarDiT, world: World, config: ParallelConfig) -> Execution:
    """The execution of layers that run as they are, on the device of this rank."""
    return LOCAL


class Parallelizer(NamedTuple):
    """What a plan does to a model before and after its weights are loaded.

    `cut` divides the model among the ranks while it has no memory, `allocate` gives its parameters memory, and `start`, once they are
    filled, says how the model is executed.
    """

    cut: Step = cut_nothing
    allocate: Step = allocate_on_device
    start: Start = run_unchanged


def _allocate_shards(model: AvatarDiT, world: World, config: ParallelConfig) -> None:
    model.to_empty(device="cpu" if config.cpu_offload else world.device)
    for name in WHOLE:
        getattr(model, name).to_empty(device=world.device)


def _cut_to_range(model: AvatarDiT, world: World, config: ParallelConfig) -> None:
    keep_range(model, world.stage, layer_ranges(model.config, world.stages, config.layers))


WHOLE_MODEL = Parallelizer()
SHARDED = Parallelizer(shard, _allocate_shards, prefetch_in_order)
OFFLOADED = Parallelizer(allocate=allocate_layers, start=load_before_use)
STAGES = Parallelizer(_cut_to_range)
ZERO3 = Parallelizer(allocate=allocate_slices, start=start_engines)


def parallelizer_of(plan: str) -> Parallelizer:
    """The parallelizer of a plan."""
    return resolve_name(f"{__name__}:{pick(PLANS, plan, 'parallel.name').parallelizer}")


def build_parallel_model(
    config: ModelConfig, weights: str | Path | None, context: DistributedContext, *, lora: Lora, dtype: torch.dtype
) -> AvatarDiT:
    """The transformer under the plan of `context`, with only this rank's weights; no process ever holds more than its own.

    Sets the execution and the channel of `context`. Without a file of weights they are random.
    """
    world, parallel = context.world, context.parallel
    parallelizer = parallelizer_of(world.plan)
    model = without_memory(config).to(dtype).eval().requires_grad_(False)
    shapes = shapes_of(model)
    parallelizer.cut(model, world, parallel)
    parallelizer.allocate(model, world, parallel)
    if weights is None:
        fill_randomly(model)
    else:
        fill(model, weights, shapes=shapes, lora=lora)
    context.execution = replace(parallelizer.start(model, world, parallel), sequence=sequence_parallel(world, config.trunk.num_heads))
    if world.stages > 1 and not world.holds_vae:
        context.channel = pipeline_channel(world)
    return model
