"""Checkpoints on disk: tensors as safetensors and facts as JSON, written aside and renamed. Holds no pickles."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

LOG = logging.getLogger(__name__)
TENSORS, FACTS = "state.safetensors", "facts.json"


def write(folder: Path, step: int, *, tensors: Mapping[str, Tensor], facts: Mapping[str, object]) -> Path:
    """Keep `tensors` and `facts` as `folder/step_XXXXXXXX`. A crash at any moment leaves either all of it or nothing."""
    final = folder / f"step_{step:08d}"
    aside = folder / f".aside_{step:08d}_{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, aside / TENSORS)
        record = {"step": step, "sha256": _digest(aside / TENSORS), **facts}
        (aside / FACTS).write_text(json.dumps(record, indent=1))
        for name in (TENSORS, FACTS):
            _flush(aside / name)
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        _flush(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return final


def read(checkpoint: Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors and facts of one checkpoint. Raises ValueError when a file is missing or damaged."""
    try:
        facts = json.loads((checkpoint / FACTS).read_text())
        if _digest(checkpoint / TENSORS) != facts["sha256"]:
            raise ValueError(f"checkpoint {checkpoint} is damaged: its tensors do not match their digest")
        return load_file(checkpoint / TENSORS), facts
    except (OSError, json.JSONDecodeError, KeyError, SafetensorError) as error:
        raise ValueError(f"checkpoint {checkpoint} cannot be read ({error})") from error


def newest(folder: Path) -> tuple[Path, dict[str, Tensor], dict] | None:
    """The newest checkpoint that reads well, with its tensors and facts. None = none at all.

    Newer ones that are damaged are said and renamed, so that they are not taken for good ones again.
    """
    for checkpoint in _newest_first(folder):
        try:
            return checkpoint, *read(checkpoint)
        except ValueError as error:
            LOG.warning("%s; falling back to the one before", error)
            shutil.rmtree(folder / f"damaged_{checkpoint.name}", ignore_errors=True)
            checkpoint.rename(folder / f"damaged_{checkpoint.name}")
    return None


def prune(folder: Path, keep: int) -> None:
    """Leave the `keep` newest checkpoints, and nothing half-written of runs that died."""
    for old in list(_newest_first(folder))[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    for half in folder.glob(".aside_*"):
        shutil.rmtree(half, ignore_errors=True)


def _newest_first(folder: Path) -> Iterator[Path]:
    return iter(sorted(folder.glob("step_*"), reverse=True))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        state = sha256()
        while chunk := file.read(1 << 20):
            state.update(chunk)
    return state.hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
