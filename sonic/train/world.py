"""The processes that train together, as one value; alone, everything is a no-op."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """This process among those that train together. `writers` is a group of their own for checkpoints, which flow beside the training."""

    rank: int = 0
    ranks: int = 1
    device: torch.device = torch.device("cpu")
    writers: dist.ProcessGroup | None = None

    @property
    def main(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0

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


def join_world(device: torch.device) -> World:
    """The world that torchrun started this process in, or one of this process alone."""
    if not dist.is_initialized():
        if not dist.is_torchelastic_launched():
            return World(device=device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return World(dist.get_rank(), dist.get_world_size(), device, dist.new_group(backend="gloo"))
