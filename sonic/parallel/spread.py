"""The plans by name: what each does to a model before its weights are there, where weights live, and what it does afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import torch

from sonic.config import ModelConfig
from sonic.model.dit import AvatarDiT
from sonic.parallel.context import share_tokens
from sonic.parallel.load import Lora, fill, fill_randomly, without_memory
from sonic.parallel.mesh import World
from sonic.parallel.offload import offload, place
from sonic.parallel.pipeline import Line, Stages, keep_range, layer_ranges, make_line
from sonic.parallel.settings import ParallelConfig
from sonic.parallel.shard import shard
from sonic.parallel.units import WHOLE
from sonic.parallel.vae_rank import make_wire
from sonic.parallel.zero import cut_nothing, place_slices, start_engines
from sonic.types import pick

Step = Callable[[AvatarDiT, World, ParallelConfig], None]  # in place


def nothing(model: AvatarDiT, world: World, config: ParallelConfig) -> None:
    """The plan has nothing to do here."""


class Plan(NamedTuple):
    """`cut` works on the model without memory, `place` gives its parameters memory, `start` works on the filled model."""

    cut: Step = nothing
    place: Step = lambda model, world, config: model.to_empty(device=world.device)
    start: Step = nothing


def _place_shards(model: AvatarDiT, world: World, config: ParallelConfig) -> None:
    model.to_empty(device="cpu" if config.cpu_offload else world.device)
    for name in WHOLE:
        getattr(model, name).to_empty(device=world.device)


def _cut_to_range(model: AvatarDiT, world: World, config: ParallelConfig) -> None:
    keep_range(model, world.stage, layer_ranges(model.config, world.stages, config.layers))


PLANS: Mapping[str, Plan] = {
    "single": Plan(),
    "fsdp": Plan(shard, _place_shards),
    "offload": Plan(
        place=lambda model, world, config: place(model, world.device, config.offload),
        start=lambda model, world, config: offload(model, world.device, config),
    ),
    "pipeline": Plan(_cut_to_range),
    "context": Plan(),
    "zero3": Plan(cut_nothing, place_slices, start_engines),
}


@dataclass
class Company:
    """The ranks that make films together, how, and the line that this one is part of in a pipeline; how many films were begun, and
    whether there will be no more."""

    world: World = field(default_factory=lambda: World("single", torch.device("cpu")))
    parallel: ParallelConfig = field(default_factory=lambda: ParallelConfig("single"))
    line: Line | None = None
    takes: int = 0
    dismissed: bool = False

    @cached_property
    def wire(self) -> Line:
        """Between the first rank and the one that keeps the autoencoder; made when either needs it."""
        return make_wire(self.world)


def spread_model(config: ModelConfig, weights: str | Path | None, company: Company, *, lora: Lora, dtype: torch.dtype) -> AvatarDiT:
    """The transformer under a plan, with this rank's weights and no others. Nobody ever holds more than that.

    Without a file of weights they are random.
    """
    world, parallel = company.world, company.parallel
    plan = pick(PLANS, world.plan, "parallel.name")
    model, shapes = without_memory(config, dtype)
    plan.cut(model, world, parallel)
    plan.place(model, world, parallel)
    if weights is None:
        fill_randomly(model)
    else:
        fill(model, weights, shapes, lora=lora)
    plan.start(model, world, parallel)
    if world.stages > 1 and not world.keeps_vae:
        company.line = make_line(world)
        if world.stage == 0:
            model.forwards = partial(Stages, line=company.line)
    if world.size("cp") > 1:
        share_tokens(model, world.group("cp"))
    model.company = company
    return model
