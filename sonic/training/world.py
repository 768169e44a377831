"""The processes that train together, as one value; alone, everything is a no-op."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from sonic.model.execution import LOCAL, Execution
from sonic.parallel.ulysses import sequence_parallel


@dataclass(frozen=True)
class World:
    """This process among those that train together. `writers` is a group of their own for checkpoints, which flow beside the training;
    `context` processes in a row share the tokens of each batch, in the group `sharers`."""

    rank: int = 0
    ranks: int = 1
    device: torch.device = torch.device("cpu")
    writers: dist.ProcessGroup | None = None
    context: int = 1
    sharers: dist.ProcessGroup | None = None

    @property
    def main(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0

    @property
    def readers(self) -> int:
        """How many batches are worked on at the same time."""
        return self.ranks // self.context

    @property
    def reader(self) -> int:
        """Which of them this process works on."""
        return self.rank // self.context

    def execution(self, num_heads: int) -> Execution:
        """How transformers are executed: processes in a row share the tokens of a batch.

        Gradients of a share add up over those who share, and the mean over all processes counts each of them: it is right.
        """
        return Execution(sequence_parallel(self.sharers, num_heads)) if self.sharers else LOCAL

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes, everywhere the same."""
        if self.ranks > 1:
            dist.all_reduce(values)
            values /= self.ranks
        return values

    def agree(self, value: float) -> float:
        """What the main process says."""
        if self.ranks == 1:
            return value
        said = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(said, src=0)
        return float(said)

    def wait(self) -> None:
        """Until all have come here."""
        if self.ranks > 1:
            dist.barrier()


def join_world(device: torch.device, *, context: int = 1) -> World:
    """The world that torchrun started this process in, or one of this process alone.

    Raises ValueError unless the processes can be parted into rows of `context`.
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
