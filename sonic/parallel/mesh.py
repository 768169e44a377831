"""The process group, the axes of its device mesh, and the timeouts between ranks."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sonic.config import Ranks
from sonic.parallel.parallel_config import SINGLE_RANK_PLANS, ParallelConfig
from sonic.parallel.watchdog import watch_ranks
from sonic.system.heartbeat import waiting_for_others

log = logging.getLogger("sonic.parallel")
T = TypeVar("T")

AXES = ("dp_replicate", "layers", "cp")  # copies of the model; ranks that share its layers or shards; ranks that share tokens
GROUPED = ("fsdp", "zero3")  # plans that need a process group even with one rank
LANES = 4  # directions of messages: two along the stages, two between the first rank and the autoencoder's
COLLECTIVE_TIMEOUT = timedelta(hours=24)  # the first rank may take long to encode a video


@dataclass(frozen=True)
class World:
    """The process group as seen by this rank: plan, device, and meshes.

    `mesh` has the axes AXES, or is None for one process without a group; `rollout_mesh` is the axes layers and cp as one: all ranks that
    have a copy of the model together. `sharding_mesh` is FSDP's: the same ranks, which have the shards, and for HSDP before it the axis
    dp_replicate, along which ranks have copies of them. With `vae_rank` the last rank along layers has the autoencoder and no layers.
    `lanes` are process groups for each direction of messages under NCCL, `writers` is a gloo group for checkpoints saved in the background.
    """

    plan: str = "single"
    device: torch.device = torch.device("cpu")
    mesh: DeviceMesh | None = None
    rollout_mesh: DeviceMesh | None = None
    sharding_mesh: DeviceMesh | None = None
    vae_rank: bool = False
    lanes: tuple[dist.ProcessGroup, ...] = ()
    writers: dist.ProcessGroup | None = None

    @property
    def rank(self) -> int:
        """Global index of this rank; 0 without a group."""
        return 0 if self.mesh is None else dist.get_rank()

    @property
    def ranks(self) -> int:
        """Number of all ranks; 1 without a group."""
        return 1 if self.mesh is None else dist.get_world_size()

    @property
    def main(self) -> bool:
        """Whether this is rank 0, which writes logs and files."""
        return self.rank == 0

    def size(self, axis: str) -> int:
        """Number of ranks along an axis."""
        return 1 if self.mesh is None else self.mesh[axis].size()

    def coordinate(self, axis: str) -> int:
        """Index of this rank along an axis."""
        return 0 if self.mesh is None else self.mesh[axis].get_local_rank()

    @property
    def data_ranks(self) -> int:
        """Number of ranks, or of groups of ranks that share tokens, that have batches of their own in a training."""
        return self.size("dp_replicate") * self.size("layers")

    @property
    def data_rank(self) -> int:
        """Index of this rank, or of its group, among them."""
        return self.coordinate("dp_replicate") * self.size("layers") + self.coordinate("layers")

    def group(self, axis: str) -> dist.ProcessGroup:
        """The process group of this rank along an axis."""
        return self.mesh[axis].get_group()

    def from_first_rank(self, thing: T) -> T:
        """The first rank's `thing`, sent to all ranks; every rank must call this."""
        box = [thing]
        if self.mesh is not None:
            with waiting_for_others():
                dist.broadcast_object_list(box, src=0)
        return box[0]

    def mean(self, values: Tensor) -> Tensor:
        """Replace a tensor by its mean over all ranks, in place. Collective."""
        if self.ranks > 1:
            with waiting_for_others():
                dist.all_reduce(values)
            values /= self.ranks
        return values

    def largest(self, number: int) -> int:
        """The largest number that any rank gives. Collective."""
        box = torch.tensor(int(number))
        if self.ranks > 1:
            with waiting_for_others():
                dist.all_reduce(box, dist.ReduceOp.MAX)
        return int(box)

    def wait(self) -> None:
        """Barrier: wait until all ranks have called this."""
        if self.ranks > 1:
            with waiting_for_others():
                dist.all_reduce(torch.zeros(1))  # on the CPU by gloo, which raises when a rank is lost; with NCCL a barrier would wait

    @property
    def stages(self) -> int:
        """Number of stages of the layer pipeline; 1 under other plans."""
        return self.size("layers") - self.vae_rank if self.plan == "pipeline" else 1

    @property
    def stage(self) -> int:
        """Index of this rank's stage; equal to `stages` on the rank that has the autoencoder."""
        return self.coordinate("layers") if self.plan == "pipeline" else 0

    @property
    def holds_vae(self) -> bool:
        """Whether this rank has the autoencoder and no layers."""
        return self.vae_rank and self.stage == self.stages

    @property
    def leads(self) -> bool:
        """Whether this rank is the first of those that generate a video together."""
        return self.coordinate("layers") == 0 and self.coordinate("cp") == 0

    @property
    def alone(self) -> bool:
        """Whether this rank makes its videos without other ranks."""
        return self.size("layers") * self.size("cp") == 1

    @property
    def rollout_group(self) -> dist.ProcessGroup | None:
        """The ranks that run the same forwards as this one, each on its share of tokens or weights; None when there are no others.

        In a pipeline these are the ranks of one stage.
        """
        if self.mesh is None:
            return None
        ranks = self.mesh["cp"] if self.plan == "pipeline" else self.rollout_mesh
        return ranks.get_group() if ranks.size() > 1 else None


def degrees(config: ParallelConfig, ranks: int) -> tuple[int, int, int]:
    """Sizes of the axes AXES for `ranks` ranks; a degree of -1 takes the ranks that the others leave.

    Raises ValueError when the degrees do not divide the ranks, or the plan cannot use so many.
    """
    plan, replicas, context = config.name, config.replicas, config.context
    if plan == "zero3" and replicas != 1:
        raise ValueError(f"parallel=zero3 slices weights over all ranks: leave parallel.replicas={replicas} out, or use parallel=fsdp")
    if plan == "context" and replicas != -1:
        context = -1
    left = ranks // (max(1, replicas) * max(1, context))
    replicas, context = (left if degree == -1 else degree for degree in (replicas, context))
    taken = replicas * context
    if taken < 1 or ranks % taken:
        raise ValueError(
            f"parallel.replicas={config.replicas} and parallel.context={config.context} do not divide {ranks} ranks; "
            "choose degrees whose product does"
        )
    inner = ranks // taken
    if plan in SINGLE_RANK_PLANS and inner * context > 1:
        raise ValueError(
            f"parallel={plan} makes a video on one rank but {ranks} were started; start one, choose another plan, "
            "or give parallel.replicas=-1 for requests side by side"
        )
    if config.vae_rank and inner < 2:
        raise ValueError(f"parallel.vae_rank=true needs 2 ranks or more for a video and there is {inner}: start more, or leave it out")
    return replicas, inner, context


@contextmanager
def open_world(config: ParallelConfig, ranks: Ranks, device: torch.device) -> Iterator[World]:
    """Join the process group, where there is one, and leave it at the end of the `with` block.

    Raises OtherRank in place of an error that another rank caused.
    """
    if device.type == "cuda":  # FSDP shards onto the current device; if none is set, DeviceMesh would set one itself
        torch.cuda.set_device(torch.cuda.current_device() if device.index is None else device)
    if ranks.world == 1 and config.name not in GROUPED:
        yield World(config.name, device)
        return
    own = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if ranks.world == 1 else {}
    size = ranks.world // degrees(config, ranks.world)[0]
    first = ranks.rank // size * size  # of the ranks with this copy of the model
    peers = range(first, first + size)
    dist.init_process_group(backend_for(device, ranks.local_world), timeout=COLLECTIVE_TIMEOUT, **own)
    watched = {"device": device, "patience_s": config.timeout_s, "peers": peers, "leave": dist.destroy_process_group}
    with watch_ranks(ranks.rank, ranks.world, **watched):
        world = make_world(config, config.name, device)
        for group in (*world.mesh.get_all_groups(), world.rollout_mesh.get_group()):  # to which torch gives 30 minutes
            dist.distributed_c10d._set_pg_timeout(COLLECTIVE_TIMEOUT, group)
        yield world


def backend_for(device: torch.device, local_world: int) -> str:
    """The backends of a group with `local_world` ranks on this machine: NCCL, and gloo for host memory; gloo alone, with a warning, where
    several ranks use a device, which NCCL does not allow."""
    devices = torch.cuda.device_count() if device.type == "cuda" else 0
    if devices >= local_world:
        return "cpu:gloo,cuda:nccl"
    if devices:
        log.warning("%d ranks share %d devices, so their messages pass through host memory (gloo), which is slow", local_world, devices)
    return "gloo"


def make_world(config: ParallelConfig, plan: str, device: torch.device) -> World:
    """The world of the current process group."""
    mesh = init_device_mesh(device.type, degrees(config, dist.get_world_size()), mesh_dim_names=AXES)
    rollout_mesh = mesh["layers", "cp"]._flatten("rollout")
    copies = mesh["dp_replicate"]
    sharding_mesh = rollout_mesh if copies.size() == 1 else DeviceMesh._concatenate([copies, rollout_mesh])
    lanes = _lanes() if plan == "pipeline" and direct(device) else ()
    return World(plan, device, mesh, rollout_mesh, sharding_mesh, vae_rank=bool(config.vae_rank), lanes=lanes)


def direct(device: torch.device) -> bool:
    """Whether messages are sent by NCCL, from device to device."""
    return device.type != "cpu" and "nccl" in str(dist.get_backend_config())


def _lanes() -> tuple[dist.ProcessGroup, ...]:
    """Process groups of all ranks, one for each direction of the channels.

    All ranks create all of them at the same point: torch names a group by the number of groups before it, so ranks that have created
    different numbers would wait for each other forever. Two ranks connect at their first message.
    """
    return tuple(dist.new_group(timeout=COLLECTIVE_TIMEOUT) for _ in range(LANES))
