"""Initial values of a training besides the pretrained weights: random adapters, and the weights of an earlier training (init_from)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from sonic.checkpoint.load import shape_of, slice_of
from sonic.checkpoint.lora import ALPHA, peft_name
from sonic.model.adapters import DOWN, UP, LowRank

LOG = logging.getLogger(__name__)


@torch.no_grad()
def begin_adapters(roles: Iterable[nn.Module], rng: torch.Generator) -> None:
    """Initialise adapters to have no effect, with the same random values on any number of processes."""
    for role in roles:
        for adapter in (module for module in role.modules() if isinstance(module, LowRank)):
            bound = adapter.lora_A.in_features**-0.5
            drawn = torch.empty(adapter.lora_A.weight.shape).uniform_(-bound, bound, generator=rng)
            part = slice_of(adapter.lora_A.weight)
            part.copy_from(drawn[part.index])
            slice_of(adapter.lora_B.weight).local.zero_()


@torch.no_grad()
def start_from(module: nn.Module, path: Path, metadata: Mapping[str, str]) -> None:
    """Load every tensor of `path` whose name and shape match; of sharded parameters, this process's slice.

    Names in the file may lack leading module names; adapters may have their exported names.

    `metadata` is the objective's. Raises ValueError when the file cannot be read, no tensor matches, or its adapters have another alpha.
    """
    taken, state = 0, {**module.state_dict(), **dict(module.named_parameters())}
    try:
        with safe_open(str(path), framework="pt") as file:
            _check_alpha((file.metadata() or {}).get(ALPHA), metadata.get(ALPHA), path)
            stored = set(file.keys())
            for name, value in state.items():
                found = next((each for each in _called(name) if each in stored), None)
                if found is not None and tuple(file.get_slice(found).get_shape()) == shape_of(value):
                    part = slice_of(value)
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


def _called(name: str) -> list[str]:
    """The names that a file may have for a tensor: without some leading module names, or an adapter's exported name."""
    parts = name.split(".")
    names = [".".join(parts[n:]) for n in range(len(parts))]
    if parts[-2:-1] not in ([DOWN], [UP]):
        return names
    return [*names, *(peft_name(each) for each in names[:-2])]
