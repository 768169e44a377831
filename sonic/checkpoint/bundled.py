"""The weight files in the package, which replace or are replaced by files of the user."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from sonic import assets
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
        return _files_in(BUNDLED, config)
    if given.is_file():
        return _files_in(BUNDLED, config)._replace(dit=given)
    named = _files_in(given, config)
    if not given.is_dir():
        names = ", ".join(file.name for file in named)
        raise ValueError(f"model.weights={config.weights} does not exist; name a folder with {names}, or leave it out")
    return named


def _files_in(folder: Path, config: ModelConfig) -> WeightFiles:
    """The transformer's file is called after the model; the autoencoder and the speech encoder belong to its family."""
    owners = {"dit": config.name, "autoencoder": config.family, "speech": config.family}
    return WeightFiles(*(folder / f"{owner}_{part}.safetensors" for part, owner in owners.items()))


def named_weights(name: str) -> Path:
    """The weight file that init_from names: bundled:STEM means STEM.safetensors in the package, anything else is a path."""
    if not name.startswith(IN_PACKAGE):
        return Path(name)
    there = {f"{IN_PACKAGE}{path.stem}": path for path in sorted(BUNDLED.glob("*.safetensors"))}
    one_of(name, list(there), "init_from")
    return there[name]
