"""Weights written for the library to load, and the log that a training wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from sonic.checkpoint.weights import export
from sonic.system.files import save_tensors
from sonic.training.log_destination import SCALARS, _lines


def save_weights(model: nn.Module, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """The model's tensors as one safetensors file, in the precision they have."""
    save_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in export(model).items()}, path, metadata or {})


def read_scalars(folder: Path) -> list[dict]:
    """Every complete line of a run's log, oldest first."""
    return [json.loads(line) for line in _lines(folder / SCALARS)]
