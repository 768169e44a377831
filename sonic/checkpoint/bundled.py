"""The weight files in the package: networks of the models that need no download, and adapters distilled for few sampling steps."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch

from sonic import assets
from sonic.checkpoint.weights import read_tensors
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
    bundled, named = (WeightFiles(*(folder / f"{config.name}_{part}.safetensors" for part in WeightFiles._fields))
                      for folder in (BUNDLED, Path(config.weights)))  # fmt: skip
    if config.weights in ("", STUDENT, TEACHER):
        return bundled
    if Path(config.weights).is_file():
        return bundled._replace(dit=Path(config.weights))
    if not Path(config.weights).is_dir():
        names = ", ".join(file.name for file in named)
        raise ValueError(f"model.weights={config.weights} does not exist; name a folder with {names}, or leave it out")
    return named


def named_weights(name: str) -> Path:
    """The weight file that init_from names: bundled:STEM means STEM.safetensors in the package, anything else is a path."""
    if not name.startswith(IN_PACKAGE):
        return Path(name)
    there = {f"{IN_PACKAGE}{path.stem}": path for path in sorted(BUNDLED.glob("*.safetensors"))}
    one_of(name, list(there), "init_from")
    return there[name]


def student_of(config: ModelConfig, steps: int) -> Path | None:
    """The bundled adapters distilled for `steps` sampling steps; None when there are none or the user chose other weights.

    With model.weights=student, the nearest smaller number of steps is used instead, and ValueError is raised when there is none.
    """
    if config.weights not in ("", STUDENT) or config.lora.path:
        return None
    there = _students(config)
    if config.weights == "" or steps in there:
        return there.get(steps)
    if fewer := [number for number in there if number < steps]:
        return there[max(fewer)]
    raise ValueError(
        f"model.weights={STUDENT}: no bundled student of model={config.name} for sampler.sample_steps={steps}; "
        f"use {f'sampler.sample_steps={min(there)} or more' if there else 'another model'}, or weights={TEACHER}"
    )


def _students(config: ModelConfig) -> dict[int, Path]:
    """The bundled adapter files of a model, keyed by the number of sampling steps they were distilled for."""
    start, end = f"{config.name}_", "step"
    return {int(path.stem.removeprefix(start).removesuffix(end)): path for path in BUNDLED.glob(f"{start}*{end}.safetensors")}


def files_in_words(weights: Path, adapters: str | Path | None) -> str:
    """Weight files as text for the log: bundled files by name, others by path."""
    paths = [Path(path) for path in (weights, adapters) if path]
    return " + ".join(path.name if path.parent == BUNDLED else str(path) for path in paths)


def why_no_student(config: ModelConfig, steps: int) -> str:
    """A note for the log that no student exists for `steps`; empty when the user chose the weights."""
    if config.weights or config.lora.path:
        return ""
    learnt = ", ".join(map(str, sorted(_students(config)))) or "none"
    return f" without adapters (no bundled student has learnt {steps} steps; there are those of: {learnt})"


def weights_hash(path: Path) -> str:
    """A hash of 16 digits of the tensors in a file; "" when it does not exist."""
    if not path.is_file():
        return ""
    digest = hashlib.sha256()
    for name, tensor in sorted(read_tensors(path).items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
