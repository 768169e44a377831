"""What a training starts from: transformers without memory, each process's slices of their weights, adapters drawn from the seed."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from sonic.config import ModelConfig
from sonic.model.adapters import ADAPTERS, LowRank
from sonic.model.dit import AvatarDiT
from sonic.model.weights import stored_weights

LOG = logging.getLogger(__name__)


def without_memory(config: ModelConfig) -> AvatarDiT:
    """A transformer whose weights come later, when it is known which of them are here."""
    with torch.device("meta"):
        return AvatarDiT(config)


@torch.no_grad()
def fill(model: AvatarDiT, path: str | Path) -> None:
    """Read this process's part of every weight, and nothing else; adapters are in no file.

    Raises ValueError in one sentence when the file is of another model.
    """
    wanted = {name: weight for name, weight in model.named_parameters() if ADAPTERS not in name.split(".")}
    with stored_weights(path, {name: tuple(weight.shape) for name, weight in wanted.items()}) as stored:
        for name, weight in wanted.items():
            local, place = local_part(weight)
            local.copy_(stored[name].part(place))


@torch.no_grad()
def begin_adapters(roles: Iterable[nn.Module], rng: torch.Generator) -> None:
    """Adapters that change nothing yet, drawn alike on any number of processes."""
    for role in roles:
        for adapter in (module for module in role.modules() if isinstance(module, LowRank)):
            bound = adapter.lora_A.in_features**-0.5
            drawn = torch.empty(adapter.lora_A.weight.shape).uniform_(-bound, bound, generator=rng)
            local, place = local_part(adapter.lora_A.weight)
            local.copy_(drawn[place])
            local_part(adapter.lora_B.weight)[0].zero_()


@torch.no_grad()
def start_from(module: nn.Module, path: Path) -> None:
    """Take over every tensor of `path` whose name and shape fit (with or without the name of a part in front), in slices where
    the module is in shards.

    Raises ValueError when the file cannot be read or nothing fits.
    """
    taken, state = 0, module.state_dict()
    try:
        with safe_open(str(path), framework="pt") as file:
            stored = set(file.keys())
            for name, value in state.items():
                found = next((each for each in (name.removeprefix(start) for start in ("", *_starts(name))) if each in stored), None)
                if found is not None and file.get_slice(found).get_shape() == list(value.shape):
                    local, place = local_part(value)
                    local.copy_(file.get_slice(found)[place] if place else file.get_tensor(found))
                    taken += 1
    except (OSError, SafetensorError) as error:
        raise ValueError(f"init_from={path} cannot be read: {error}") from error
    if not taken:
        raise ValueError(f"init_from={path} has no tensor that fits this model; train from the start or name other weights")
    LOG.info("took %d of %d tensors from %s", taken, len(state), path)


def local_part(weight: Tensor) -> tuple[Tensor, tuple[slice, ...]]:
    """What of a weight is here, and which part of the whole that is."""
    if not isinstance(weight, DTensor):
        return weight.data, tuple(slice(0, size) for size in weight.shape)
    shape, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    return weight.to_local(), tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def _starts(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:n]) + "." for n in range(1, len(parts))]
