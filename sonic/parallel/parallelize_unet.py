"""How each plan divides a UNet that denoises windows of frames: its weights by blocks, its windows among ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain, zip_longest
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sonic.checkpoint.load import fill, fill_randomly
from sonic.checkpoint.lora import NO_LORA, Lora
from sonic.config import UNetConfig
from sonic.model.svd_unet import SvdUNet
from sonic.parallel.context import DistributedContext
from sonic.parallel.fsdp import Sharding
from sonic.parallel.mesh import World
from sonic.parallel.offload import allocate_offloaded, load_layers_before_use
from sonic.parallel.parallel_config import ParallelConfig
from sonic.sampling.windows import ALONE, Spread
from sonic.system.heartbeat import waiting_for_others
from sonic.types import pick

Step = Callable[[SvdUNet, World, ParallelConfig], None]  # changes the UNet in place


class UNetParallelizer(NamedTuple):
    """What a plan does to a UNet without memory, and what it does once the weights are loaded."""

    allocate: Step
    start: Step = lambda unet, world, config: None


def _allocate_whole(unet: SvdUNet, world: World, config: ParallelConfig) -> None:
    unet.to_empty(device=world.device)


def _allocate_shards(unet: SvdUNet, world: World, config: ParallelConfig) -> None:
    shard(unet, world, config)
    unet.to_empty(device="cpu" if config.cpu_offload else world.device)


def shard(unet: SvdUNet, world: World, config: ParallelConfig) -> None:
    """Shard the units over the ranks that make a video together, and what lies outside them with the root."""
    sharding = Sharding(world.sharding_mesh, reshard=config.reshard, cpu_offload=config.cpu_offload)
    sharding.apply_to_units(unet, units_of(unet, config.unshard_unit))


def _prefetch_in_order(unet: SvdUNet, world: World, config: ParallelConfig) -> None:
    """Gather the next `config.prefetch` units while one runs."""
    units = units_of(unet, config.unshard_unit)
    for place, unit in enumerate(units):
        unit.set_modules_to_forward_prefetch(units[place + 1 : place + 1 + config.prefetch])


def _allocate_offloaded(unet: SvdUNet, world: World, config: ParallelConfig) -> None:
    allocate_offloaded(unet, _layers(unet), world, config=config)


def _load_before_use(unet: SvdUNet, world: World, config: ParallelConfig) -> None:
    load_layers_before_use(_layers(unet), world, config)


def _allocate_copy(unet: SvdUNet, world: World, config: ParallelConfig) -> None:
    """Allocate all weights for each rank: on its device, or with parallel.cpu_offload in host memory."""
    (_allocate_offloaded if config.cpu_offload else _allocate_whole)(unet, world, config)


def _start_copy(unet: SvdUNet, world: World, config: ParallelConfig) -> None:
    if config.cpu_offload:
        _load_before_use(unet, world, config)


def _layers(unet: SvdUNet) -> list[list[nn.Module]]:
    return [[unit] for unit in units_of(unet, "sublayer")]


PARALLELIZERS: Mapping[str, UNetParallelizer] = {
    "single": UNetParallelizer(_allocate_whole),
    "windows": UNetParallelizer(_allocate_copy, _start_copy),
    "fsdp": UNetParallelizer(_allocate_shards, _prefetch_in_order),
    "offload": UNetParallelizer(_allocate_offloaded, _load_before_use),
}


def units_of(unet: SvdUNet, unshard_unit: str) -> list[nn.Module]:
    """The modules whose weights are gathered or loaded together, in the order in which a forward runs them.

    A `block` is a level of the UNet on its way down or up, a `sublayer` a residual block, a transformer or a change of size in it. Raises
    ValueError for other units.
    """
    if unshard_unit == "block":
        return unet.units()
    if unshard_unit != "sublayer":
        raise ValueError(f"parallel.unshard_unit={unshard_unit}: a UNet is gathered by block or sublayer; use one of them")
    return [part for block in unet.units() for part in _sublayers(block)]


def _sublayers(block: nn.Module) -> list[nn.Module]:
    """The parts of a block of diffusers in the order in which they run."""
    children = dict(block.named_children())
    pairs = zip_longest(children["resnets"], children.get("attentions", ()))
    sizes = (part for name in ("downsamplers", "upsamplers") for part in children.get(name) or ())
    return [part for part in (*chain.from_iterable(pairs), *sizes) if part is not None]


def build_parallel_unet(
    config: UNetConfig, weights: str | Path | None, context: DistributedContext, *, dtype: torch.dtype, lora: Lora = NO_LORA
) -> SvdUNet:
    """The UNet under the plan of `context`, with only this rank's weights and its part of `lora`; no process ever holds more than its own.

    Without weights they are random. Raises ValueError when they are of another model.
    """
    world, parallel = context.world, context.parallel
    parallelizer = pick(PARALLELIZERS, world.plan, "parallel.name")
    with torch.device("meta"):
        unet = SvdUNet(config)
    unet = nn.Module.to(unet, dtype).eval().requires_grad_(False)
    parallelizer.allocate(unet, world, parallel)
    if weights is None:
        fill_randomly(unet)
    else:
        fill(unet, weights, lora=lora)
    parallelizer.start(unet, world, parallel)
    return unet


class RankSpread(Spread):
    """Divides the windows of a step among the ranks of a group: window b is that of rank b mod P.

    Ranks with fewer windows repeat one, so that all ranks run equally many forwards, whose weights they may gather together.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.ranks = group, dist.get_rank(group), dist.get_world_size(group)

    def mine(self, windows: int) -> list[int]:
        """The numbers of this rank's windows, and behind them repeated ones."""
        return [min(number, windows - 1) for number in range(self.rank, -(-windows // self.ranks) * self.ranks, self.ranks)]

    def exchange(self, own: list[Tensor]) -> list[Tensor]:
        """The results of all windows in order, behind which repeated ones may follow. Collective: the one exchange of a step."""
        mine = torch.stack(own)
        found = [torch.empty_like(mine) for _ in range(self.ranks)]
        with waiting_for_others():
            dist.all_gather(found, mine, group=self.group)
        return [result for turn in zip(*found, strict=True) for result in turn]


def spread_of(world: World) -> Spread:
    """The share of the windows of a step that this rank evaluates."""
    return ALONE if world.rollout_group is None else RankSpread(world.rollout_group)
