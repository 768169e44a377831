"""Joins the process group of a training: FSDP shards over all ranks, or over each of `speed.replicas` groups of consecutive ranks, and
`speed.context` consecutive ranks share a batch.

Ranks along the mesh axes "dp_replicate" and "layers" have batches of their own, those along "cp" share the tokens of one.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist

from sonic.parallel.mesh import World, backend_for, make_world
from sonic.parallel.parallel_config import ParallelConfig


def join_world(device: torch.device, *, context: int = 1, replicas: int = 1, local_world: int = 1) -> World:
    """The group of processes started by torchrun, `local_world` of them on this machine, or a group of this process alone.

    Raises ValueError when the number of processes is not a multiple of `context` times `replicas`.
    """
    if device.index is not None:
        torch.cuda.set_device(device)
    if not dist.is_initialized() and dist.is_torchelastic_launched():
        dist.init_process_group(backend_for(device, local_world))
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if ranks % (context * replicas):
        fits = [number for number in range(1, ranks + 1) if ranks % number == 0]
        copies, needs = f"speed.replicas={replicas} copies of the weights, each on ", f"a product that is one of {fits}"
        asked = f"{copies if replicas > 1 else ''}speed.context={context} processes to a batch"
        raise ValueError(f"{asked} do not divide the {ranks} that were started; use {needs if replicas > 1 else f'one of {fits}'}")
    if not dist.is_initialized():
        return World(device=device)
    world = make_world(ParallelConfig("fsdp", context=context, replicas=replicas), "fsdp", device)
    return replace(world, writers=dist.new_group(backend="gloo"))
