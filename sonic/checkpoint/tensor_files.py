"""Files of tensors: their shapes and precisions from headers, their contents one tensor at a time."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sonic.system.heartbeat import heartbeat

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SAFETENSORS_NAMES = {dtype: name for name, dtype in FLOATS.items()}
HEADER_STEP = 8  # a header's length is a multiple of this many bytes, and is itself stored in as many
PICKLES = (".pth", ".bin", ".pkl")  # suffixes of files that torch.save wrote; all others are safetensors


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, not read yet: its name there, its shape, and its dtype in safetensors' spelling."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def whole(self) -> Tensor:
        """The tensor as a memory map of its safetensors file, whose pages are read when they are used."""
        heartbeat()
        with _opened(self.file) as file:
            return file.get_tensor(self.name)

    def part(self, index: tuple[slice, ...]) -> Tensor:
        """A slice of the tensor, read from its safetensors file."""
        heartbeat()
        with _opened(self.file) as file:
            return file.get_slice(self.name)[index]


def survey(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a .safetensors file or a pickle, by name. Raises ValueError when it is missing, cut short, or contains code."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist; fetch it again")
    if path.suffix in PICKLES:
        return {
            name: StoredTensor(path, name, tuple(tensor.shape), SAFETENSORS_NAMES.get(tensor.dtype, str(tensor.dtype)))
            for name, tensor in _pickled(path).items()
        }
    with _opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: StoredTensor(path, name, tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}


def survey_sharded(folder: Path, stem: str) -> dict[str, StoredTensor]:
    """The tensors of the shards in `stem`.safetensors.index.json, or of the single file `stem`.safetensors, by name.

    Raises ValueError when index and shards do not agree.
    """
    index = folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        return survey(folder / f"{stem}.safetensors")
    try:
        shard_of: dict[str, str] = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is not an index of shards ({error}); fetch it again") from error
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(shard_of.values())):
        if not (folder / shard).is_file():
            first = next(name for name, file in shard_of.items() if file == shard)
            raise ValueError(f"{index} names {shard} for tensor {first}, but {folder / shard} does not exist; fetch it again")
        tensors |= survey(folder / shard)
    wrong = sorted(name for name in shard_of if name not in tensors or tensors[name].file.name != shard_of[name])
    if wrong:
        raise ValueError(f"{index} lists tensor {wrong[0]} in {shard_of[wrong[0]]}, which does not hold it; fetch both again")
    return tensors


def _first_missing(path: Path) -> str:
    """The first tensor that is incomplete in a file cut short; empty when the file is damaged in another way."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(HEADER_STEP), "little")
        if length > size:
            return ""
        try:
            header = json.loads(file.read(length))
            ends = {name: HEADER_STEP + length + entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError):
            return ""
    incomplete = [name for name in sorted(ends, key=ends.__getitem__) if ends[name] > size]
    return f"tensor {incomplete[0]} and {len(incomplete) - 1} more are not all there" if incomplete else ""


def check(found: Mapping[str, StoredTensor], wanted: Mapping[str, Sequence[int]], what: str, *, called: Callable[[str], str] = str) -> None:
    """Raise ValueError unless `found` has exactly the wanted tensors, in their shapes.

    `what` names the network and `called` converts a wanted name to the file's, both for the error.
    """
    files = sorted({tensor.file for tensor in found.values()})
    where = files[0] if len(files) == 1 else files[0].parent if files else what
    missing = [name for name in wanted if name not in found]
    if missing:
        count = f"{len(missing)} of {len(wanted)}"
        first = called(missing[0])
        raise ValueError(f"{where}: tensor {first} of the {what} is missing ({count}); the file is damaged or for another model")
    for name, tensor in found.items():
        if name not in wanted:
            raise ValueError(f"{tensor.file}: tensor {tensor.name} has no place in the {what}; the file is for another model")
    for name, shape in wanted.items():
        tensor = found[name]
        if tensor.shape != tuple(shape):
            raise ValueError(
                f"{tensor.file}: tensor {tensor.name} has shape {list(tensor.shape)}, the {what} needs {list(shape)}; "
                "the file is damaged or for another model"
            )


def read(tensors: Iterable[StoredTensor]) -> Iterator[tuple[StoredTensor, Tensor]]:
    """The tensors one after the other, mapped from their files; the memory of each is freed when the caller drops it."""
    for path, of_file in groupby(tensors, key=lambda tensor: tensor.file):
        pickled = _pickled(path) if path.suffix in PICKLES else None
        for stored in of_file:
            yield stored, stored.whole() if pickled is None else pickled.pop(stored.name)


def write(path: Path, parts: Mapping[str, tuple[str, tuple[int, ...]]], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write a safetensors file from tensors that are computed one at a time; `parts` gives the dtype and shape of each, in their order.

    The file has its name only when it is complete.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in parts.items():
        start, end = end, end + prod(shape) * FLOATS[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % HEADER_STEP)
    partial = path.with_name(f"{path.name}.part")
    with partial.open("wb") as out:
        out.write(len(text).to_bytes(HEADER_STEP, "little") + text)
        for name, (tensor_name, tensor) in zip(parts, tensors, strict=True):
            assert (tensor_name, SAFETENSORS_NAMES[tensor.dtype], tuple(tensor.shape)) == (name, *parts[name])
            out.write(tensor.contiguous().flatten().view(torch.uint8).numpy())
        out.flush()
        os.fsync(out.fileno())
    partial.rename(path)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def joined_hash(digests: Sequence[str]) -> str:
    """A hash of 16 digits of the files with these digests."""
    return (digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest())[:16]


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


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """An open safetensors file. Raises ValueError when it is damaged."""
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is cut short or not safetensors ({_first_missing(path) or error}); fetch it again") from error


def _pickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a .pth file, memory-mapped; no code in it is run."""
    is_zip = is_zipfile(path)  # files written before torch 1.6 are not, and cannot be mapped
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except UnpicklingError as error:
        raise ValueError(f"{path} holds something other than tensors, and no code in it was run; fetch the original") from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is cut short or not a file of tensors; fetch it again") from error
    wrong = [str(name) for name, value in loaded.items() if not isinstance(value, Tensor)] if isinstance(loaded, dict) else ["its content"]
    if wrong:
        raise ValueError(f"{path}: {wrong[0]} is not a tensor; fetch the original file")
    return loaded
