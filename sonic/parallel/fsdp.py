"""Sharded weights (FSDP2): every rank stores a slice of every unit, and each unit is gathered when it is used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from sonic.model.dit import ENTRY_POINTS, STAGES, AvatarDiT
from sonic.model.execution import LOCAL, Execution, TrunkInputs
from sonic.parallel.mesh import World
from sonic.parallel.parallel_config import ParallelConfig
from sonic.parallel.shard_units import WHOLE, Unit, all_units


@dataclass(frozen=True)
class Sharding:
    """How FSDP shards a transformer: over the ranks of `mesh`; `reshard` frees a unit's gathered weights after use, `cpu_offload`
    keeps shards in host memory, `precision` has the dtypes of gathered weights and reduced gradients."""

    mesh: DeviceMesh
    reshard: bool = True
    cpu_offload: bool = False
    precision: MixedPrecisionPolicy = MixedPrecisionPolicy()  # noqa: RUF009

    def apply(self, model: AvatarDiT, units: Sequence[Unit], entry_points: Sequence[str], *, whole: Sequence[str] = ()) -> None:
        """Shard these units in place, then the other weights of each block and injector, then the rest with the root.

        `whole` names the weights that are not sharded; `entry_points` the methods, besides forward, that callers use. Parameter names do
        not change.
        """
        settings = self._settings()
        for unit in units:
            fully_shard([model.get_submodule(name) for name in unit.modules], reshard_after_forward=self.reshard, **settings)
        for module in [*model.blocks, *model.audio_injectors]:
            if not isinstance(module, FSDPModule):
                fully_shard(module, reshard_after_forward=self.reshard, **settings)
        kept = {weight for name in whole for weight in getattr(model, name).parameters()}
        fully_shard(model, reshard_after_forward=False, ignored_params=kept, **settings)
        for name in entry_points:
            register_fsdp_forward_method(model, name)

    def apply_to_units(self, model: nn.Module, units: Sequence[nn.Module]) -> None:
        """Shard these parts of a network in place, then the rest with the root. Parameter names do not change."""
        for unit in units:
            fully_shard(unit, reshard_after_forward=self.reshard, **self._settings())
        fully_shard(model, reshard_after_forward=False, **self._settings())

    def _settings(self) -> dict[str, Any]:
        pin = self.mesh.device_type != "cpu"
        policy = CPUOffloadPolicy(pin_memory=pin) if self.cpu_offload else OffloadPolicy()
        return {"mesh": self.mesh, "mp_policy": self.precision, "offload_policy": policy}


def free_gathered(model: nn.Module) -> None:
    """Free the gathered weights of a model, if it is sharded; optimizers and checkpoints know the shards alone."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def shard(model: AvatarDiT, world: World, config: ParallelConfig) -> None:
    """Shard a model without weights over the ranks that generate a video together; under HSDP other ranks have copies of it.

    Every projection is part of a unit; the root keeps the patch embeddings and the head.
    """
    sharding = Sharding(world.sharding_mesh, reshard=config.reshard, cpu_offload=config.cpu_offload)
    sharding.apply(model, all_units(model.config, config.unshard_unit), (*ENTRY_POINTS, *STAGES), whole=WHOLE)


def prefetch_in_order(model: AvatarDiT, world: World, config: ParallelConfig) -> Execution:
    """The execution of a sharded model that gathers the next `config.prefetch` units ahead of use."""
    return Execution(run_blocks=OrderedPrefetch(model, config.prefetch)) if config.prefetch else LOCAL


class OrderedPrefetch:
    """Runs the blocks while FSDP gathers the next `depth` units ahead, in the order in which the first pass of this kind used them.

    Prefill uses other units than a block (no injectors, but the prompt's keys), so each kind of pass has its own order.
    """

    def __init__(self, model: nn.Module, depth: int) -> None:
        self.depth = depth
        self.units = [module for module in model.modules() if isinstance(module, FSDPModule) and module is not model]
        self.orders: dict[tuple[bool, bool], list[FSDPModule]] = {}
        self.last: tuple[bool, bool] | None = None

    def __call__(self, model: AvatarDiT, inputs: Sequence[TrunkInputs], contexts: Sequence[Callable]) -> list[TrunkInputs]:
        """`model.run_blocks` with prefetching."""
        kind = (inputs[0].text is not None, inputs[0].audio is not None)
        if kind in self.orders:
            if self.last != kind:
                _set_prefetch(self.units, self.orders[kind], self.depth)
                self.last = kind
            return model.run_blocks(inputs, contexts)
        _set_prefetch(self.units, [], self.depth)
        self.last = None
        used: dict[FSDPModule, None] = {}
        hooks = [unit.register_forward_pre_hook(lambda module, args: used.setdefault(module, None)) for unit in self.units]
        try:
            outputs = model.run_blocks(inputs, contexts)
        finally:
            for hook in hooks:
                hook.remove()
        self.orders[kind] = list(used)
        return outputs


def _set_prefetch(units: Sequence[FSDPModule], order: Sequence[FSDPModule], depth: int) -> None:
    for unit in units:
        unit.set_modules_to_forward_prefetch([])
    for position, unit in enumerate(order):
        unit.set_modules_to_forward_prefetch(list(order[position + 1 : position + 1 + depth]))
