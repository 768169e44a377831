"""The group of processes of a training run; with one process, all collectives are no-ops."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from sonic.model.execution import LOCAL, Execution
from sonic.parallel.ulysses import sequence_parallel


@dataclass(frozen=True)
class World:
    """This process's place in a training run. `writers` is a separate process group for background checkpoints; each row of `context`
    consecutive processes shares the tokens of each batch, in the process group `sharers`."""

    rank: int = 0
    ranks: int = 1
    device: torch.device = torch.device("cpu")
    writers: dist.ProcessGroup | None = None
    context: int = 1
    sharers: dist.ProcessGroup | None = None

    @property
    def main(self) -> bool:
        """Whether this is the main process (rank 0)."""
        return self.rank == 0

    @property
    def readers(self) -> int:
        """Number of batches processed at the same time."""
        return self.ranks // self.context

    @property
    def reader(self) -> int:
        """Index of the batch this process works on, among those processed at the same time."""
        return self.rank // self.context

    def execution(self, num_heads: int) -> Execution:
        """How transformers are executed: with sequence parallelism over each row of processes.

        The gradients are sums over the row while the mean is taken over all processes, which needs no further correction.
        """
        return Execution(sequence_parallel(self.sharers, num_heads)) if self.sharers else LOCAL

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes, on every process."""
        if self.ranks > 1:
            dist.all_reduce(values)
            values /= self.ranks
        return values

    def agree(self, value: float) -> float:
        """The main process's value, on every process."""
        if self.ranks == 1:
            return value
        value_tensor = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(value_tensor, src=0)
        return float(value_tensor)

    def wait(self) -> None:
        """Barrier: wait until all processes have called it."""
        if self.ranks > 1:
            dist.barrier()


def join_world(device: torch.device, *, context: int = 1) -> World:
    """The group of processes started by torchrun, or a group of this process alone.

    Raises ValueError when the number of processes is not a multiple of `context`.
    """
    if device.type == "cuda" and dist.is_torchelastic_launched():
        torch.cuda.set_device(dist.get_node_local_rank())
    if not dist.is_initialized() and dist.is_torchelastic_launched():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")  # gloo for what waits in host memory
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if ranks % context:
        fits = [number for number in range(1, ranks + 1) if ranks % number == 0]
        raise ValueError(f"speed.context={context} processes to a batch do not divide the {ranks} that were started; use one of {fits}")
    if not dist.is_initialized():
        return World(device=device)
    writers, sharers = dist.new_group(backend="gloo"), None
    if context > 1:
        rows = [list(range(first, first + context)) for first in range(0, ranks, context)]
        sharers, _ = dist.new_subgroups_by_enumeration(rows)
    return World(dist.get_rank(), ranks, device, writers, context, sharers)
