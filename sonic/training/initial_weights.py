"""Initial weights of a training: transformers on the meta device, loading of each process's slices, and random adapters."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from sonic.checkpoint.weights import stored_weights
from sonic.config import ModelConfig
from sonic.model.adapters import ADAPTERS, LowRank, peft_name
from sonic.model.dit import AvatarDiT
from sonic.model.lora import ALPHA, DOWN, UP

LOG = logging.getLogger(__name__)


def without_memory(config: ModelConfig) -> AvatarDiT:
    """A transformer on the meta device; its weights are loaded later, once it is sharded."""
    with torch.device("meta"):
        return AvatarDiT(config)


@torch.no_grad()
def fill(model: AvatarDiT, path: str | Path) -> None:
    """Read this process's slice of every weight from a file; adapters are skipped.

    Raises ValueError when the file is of another model.
    """
    wanted = {name: weight for name, weight in model.named_parameters() if ADAPTERS not in name.split(".")}
    with stored_weights(path, {name: shape_of(weight) for name, weight in wanted.items()}) as stored:
        for name, weight in wanted.items():
            part = part_of(weight)
            part.copy_from(stored[name].part(part.index))


@torch.no_grad()
def begin_adapters(roles: Iterable[nn.Module], rng: torch.Generator) -> None:
    """Initialise adapters to have no effect, with the same random values on any number of processes."""
    for role in roles:
        for adapter in (module for module in role.modules() if isinstance(module, LowRank)):
            bound = adapter.lora_A.in_features**-0.5
            drawn = torch.empty(adapter.lora_A.weight.shape).uniform_(-bound, bound, generator=rng)
            part = part_of(adapter.lora_A.weight)
            part.copy_from(drawn[part.index])
            part_of(adapter.lora_B.weight).local.zero_()


@torch.no_grad()
def start_from(module: nn.Module, path: Path, metadata: Mapping[str, str]) -> None:
    """Load every tensor of `path` whose name and shape fit (with or without a submodule's name in front; adapters as exported);
    of sharded parameters, this process's slice.

    `metadata` is the objective's. Raises ValueError when the file cannot be read, nothing fits, or its adapters have another alpha.
    """
    taken, state = 0, {**module.state_dict(), **dict(module.named_parameters())}
    try:
        with safe_open(str(path), framework="pt") as file:
            _check_alpha((file.metadata() or {}).get(ALPHA), metadata.get(ALPHA), path)
            stored = set(file.keys())
            for name, value in state.items():
                found = next((each for each in _called(name) if each in stored), None)
                if found is not None and tuple(file.get_slice(found).get_shape()) == shape_of(value):
                    part = part_of(value)
                    part.copy_from(file.get_slice(found)[part.index] if part.index else file.get_tensor(found))
                    taken += 1
    except (OSError, SafetensorError) as error:
        raise ValueError(f"init_from={path} cannot be read: {error}") from error
    if not taken:
        raise ValueError(f"init_from={path} has no tensor that fits this model; train from the start or name other weights")
    LOG.info("took %d of %d tensors from %s", taken, len(state), path)


def _check_alpha(saved: str | None, ours: str | None, path: Path) -> None:
    """Raise ValueError when the file's adapters were trained with another alpha."""
    if saved is not None and ours is not None and float(saved) != float(ours):
        raise ValueError(
            f"init_from={path} was learnt with alpha {saved}, not with objective.learn.alpha={ours}; use objective.learn.alpha={saved}"
        )


class WeightSlice(NamedTuple):
    """This process's slice of a weight: `index` into the full tensor, and `within`, a range of the flattened values there."""

    local: Tensor
    index: tuple[slice, ...]
    within: slice = slice(None)

    def copy_from(self, found: Tensor) -> None:
        """Copy the slice from the full tensor's values at `index`."""
        self.local.copy_(found.flatten()[self.within].view(self.local.shape))


def shape_of(weight: Tensor) -> tuple[int, ...]:
    """Shape of the full weight, sharded or not."""
    return tuple(getattr(weight, "ds_shape", weight.shape))


def part_of(weight: Tensor) -> WeightSlice:
    """This process's slice of a weight: all of it, a slice along its first axis (FSDP), or a range of its flat values (DeepSpeed)."""
    if isinstance(weight, DTensor):
        shape, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
        return WeightSlice(weight.to_local(), tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True)))
    every = tuple(slice(0, size) for size in shape_of(weight))
    if not hasattr(weight, "ds_tensor"):
        return WeightSlice(weight.data, every)
    run, row = weight.ds_tensor.numel(), weight.ds_numel // every[0].stop
    first = min(dist.get_rank() * run, weight.ds_numel)
    last = min(first + run, weight.ds_numel)
    rows = slice(first // row, -(-last // row))
    return WeightSlice(weight.ds_tensor.data[: last - first], (rows, *every[1:]), slice(first - rows.start * row, last - rows.start * row))


def _called(name: str) -> list[str]:
    """Names that a tensor may have in a file."""
    parts = name.split(".")
    names = [".".join(parts[n:]) for n in range(len(parts))]
    if parts[-2:-1] not in ([DOWN], [UP]):
        return names
    return [*names, *(peft_name(each) for each in names[:-2])]
