"""The weight files in the package, which replace or are replaced by files of the user."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch

from sonic import assets
from sonic.checkpoint.tensor_files import survey
from sonic.config import ModelConfig, one_of

BUNDLED = Path(assets.__file__).parent
IN_PACKAGE = "bundled:"  # prefix of the name of a weight file in the package
STUDENT, TEACHER = "student", "teacher"  # special values of model.weights: the bundled weights with or without distilled adapters


class WeightFiles(NamedTuple):
    """Paths of the weight files of the transformer, the autoencoder and the speech encoder."""

    dit: Path
    autoencoder: Path
    speech: Path


def weight_files(config: ModelConfig) -> WeightFiles:
    """The weight files of a model with bundled weights.

    If model.weights is a folder, all files are in it; if it is a file, that replaces the bundled transformer. Raises ValueError when
    it does not exist.
    """
    given = Path(config.weights)
    if config.weights in ("", STUDENT, TEACHER):
        return _files_in(BUNDLED, config.name)
    if given.is_file():
        return _files_in(BUNDLED, config.name)._replace(dit=given)
    named = _files_in(given, config.name)
    if not given.is_dir():
        names = ", ".join(file.name for file in named)
        raise ValueError(f"model.weights={config.weights} does not exist; name a folder with {names}, or leave it out")
    return named


def _files_in(folder: Path, model: str) -> WeightFiles:
    return WeightFiles(*(folder / f"{model}_{part}.safetensors" for part in WeightFiles._fields))


def named_weights(name: str) -> Path:
    """The weight file that init_from names: bundled:STEM means STEM.safetensors in the package, anything else is a path."""
    if not name.startswith(IN_PACKAGE):
        return Path(name)
    there = {f"{IN_PACKAGE}{path.stem}": path for path in sorted(BUNDLED.glob("*.safetensors"))}
    one_of(name, list(there), "init_from")
    return there[name]


def weights_hash(path: Path) -> str:
    """A hash of 16 digits of the tensors in a file; "" when it does not exist."""
    if not path.is_file():
        return ""
    digest = hashlib.sha256()
    for name, stored in sorted(survey(path).items()):
        tensor = stored.whole()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
