"""The distributed context: the ranks of a run, how the model runs on them, and their channels. It is passed as an argument."""

from __future__ import annotations

from dataclasses import dataclass, field

from sonic.model.execution import LOCAL, Execution
from sonic.parallel.channel import P2PChannel
from sonic.parallel.mesh import World
from sonic.parallel.parallel_config import ParallelConfig
from sonic.parallel.vae_rank import make_vae_channel


@dataclass
class DistributedContext:
    """State of one rank of a distributed run; without arguments, of a single process.

    `execution` says how forwards run on this rank; `channel` connects the stages of a layer pipeline, `vae_channel` the first rank
    and the rank of the autoencoder; `rollouts` is the number of rollouts started so far, `closed` is true when no more will start.
    """

    world: World = field(default_factory=World)
    parallel: ParallelConfig = field(default_factory=lambda: ParallelConfig("single"))
    execution: Execution = LOCAL
    channel: P2PChannel | None = None
    vae_channel: P2PChannel | None = None
    rollouts: int = 0
    closed: bool = False


def context_of(world: World, parallel: ParallelConfig) -> DistributedContext:
    """The context of this rank, before `build_parallel_model` sets its execution and channel."""
    calls_vae = world.vae_rank and (world.leads or world.holds_vae)
    return DistributedContext(world, parallel, vae_channel=make_vae_channel(world) if calls_vae else None)
