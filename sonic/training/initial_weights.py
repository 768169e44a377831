"""Initial values of a training besides the pretrained weights: random adapters, and the weights of an earlier training (init_from)."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from sonic.checkpoint.load import shape_of, slice_of
from sonic.checkpoint.lora import ALPHA
from sonic.model.adapters import LowRank
from sonic.training.objectives.networks import STUDENT
from sonic.training.objectives.objective import Objective

LOG = logging.getLogger(__name__)


@torch.no_grad()
def init_adapters(roles: Iterable[nn.Module], rng: torch.Generator) -> None:
    """Initialise adapters to have no effect, with the same random values on any number of processes."""
    for role in roles:
        for adapter in (module for module in role.modules() if isinstance(module, LowRank)):
            bound = adapter.lora_A.in_features**-0.5
            drawn = torch.empty(adapter.lora_A.weight.shape).uniform_(-bound, bound, generator=rng)
            part = slice_of(adapter.lora_A.weight)
            part.copy_from(drawn[part.index])
            slice_of(adapter.lora_B.weight).local.zero_()


@torch.no_grad()
def load_initial_weights(objective: Objective, path: Path) -> None:
    """Load every tensor of exported weights whose name and shape match the student's; of sharded parameters, this process's slice.

    Raises ValueError when the file cannot be read, no tensor matches, or its adapters have another alpha.
    """
    student = objective.roles[STUDENT]
    taken, state = 0, objective.export({**student.state_dict(), **dict(student.named_parameters())})
    try:
        with safe_open(str(path), framework="pt") as file:
            saved, ours = (file.metadata() or {}).get(ALPHA), objective.metadata.get(ALPHA)
            if saved is not None and ours is not None and float(saved) != float(ours):
                way_out = f"use objective.learn.alpha={saved}"
                raise ValueError(f"init_from={path} was learnt with alpha {saved}, not with objective.learn.alpha={ours}; {way_out}")
            stored = set(file.keys())
            for name, value in state.items():
                if name in stored and tuple(file.get_slice(name).get_shape()) == shape_of(value):
                    part = slice_of(value)
                    part.copy_from(file.get_slice(name)[part.index] if part.index else file.get_tensor(name))
                    taken += 1
    except (OSError, SafetensorError) as error:
        raise ValueError(f"init_from={path} cannot be read: {error}") from error
    if not taken:
        raise ValueError(f"init_from={path} has no tensor that fits this model; train from the start or name other weights")
    LOG.info("took %d of %d tensors from %s", taken, len(state), path)
