"""Tensors in files, surveyed before any is read: shapes and precisions from headers, contents one at a time."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
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

from sonic.system.heartbeat import beat

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WIDTHS = {name: dtype.itemsize for name, dtype in FLOATS.items()}
SAFETENSORS_NAMES = {dtype: name for name, dtype in FLOATS.items()}
HASH_CHUNK = 16 << 20
MAPPED_BYTES = 64 << 20  # of a file that are read before it is closed: what was mapped stays in memory until then
HEADER_STEP = 8  # bytes that a header's length is a multiple of
ZIP = b"PK"  # how a zip begins


@dataclass(frozen=True)
class Stored:
    """A tensor that lies in a file: its name there, shape, and precision as safetensors spells it."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        """Numbers in it."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of it."""
        return self.numel * WIDTHS[self.dtype]


def survey(path: Path) -> dict[str, Stored]:
    """What a .safetensors or .pth file holds. Raises ValueError when it is missing, cut short, or wants to run code."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist; fetch it again")
    if path.suffix == ".safetensors":
        try:
            with safe_open(str(path), framework="pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                return {name: Stored(path, name, tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is cut short or not safetensors ({_first_lost(path) or error}); fetch it again") from error
    tensors = _pickled(path)
    return {name: Stored(path, name, tuple(tensor.shape), _dtype_name(tensor)) for name, tensor in tensors.items()}


def survey_sharded(folder: Path, stem: str) -> dict[str, Stored]:
    """What the shards named by `stem`.safetensors.index.json hold, or the one file `stem`.safetensors.

    Raises ValueError when index and shards do not agree.
    """
    index = folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        return survey(folder / f"{stem}.safetensors")
    try:
        named: dict[str, str] = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is not an index of shards ({error}); fetch it again") from error
    found: dict[str, Stored] = {}
    for shard in sorted(set(named.values())):
        if not (folder / shard).is_file():
            first = next(name for name, file in named.items() if file == shard)
            raise ValueError(f"{index} names {shard} for tensor {first}, but {folder / shard} does not exist; fetch it again")
        found |= survey(folder / shard)
    wrong = sorted(name for name in named if name not in found or found[name].file.name != named[name])
    if wrong:
        raise ValueError(f"{index} promises tensor {wrong[0]} in {named[wrong[0]]}, which does not hold it; fetch both again")
    return found


def _first_lost(path: Path) -> str:
    """The first tensor that a file cut short does not hold to its end; empty when that is not what is wrong with it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(HEADER_STEP), "little")
        if length > size:
            return ""
        try:
            header = json.loads(file.read(length))
            ends = {name: HEADER_STEP + length + told["data_offsets"][1] for name, told in header.items() if name != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError):
            return ""
    lost = [name for name in sorted(ends, key=ends.__getitem__) if ends[name] > size]
    return f"tensor {lost[0]} and {len(lost) - 1} more are not all there" if lost else ""


def check(found: Mapping[str, Stored], wanted: Mapping[str, tuple[int, ...]], what: str, *, called: Callable[[str], str] = str) -> None:
    """Raise ValueError unless exactly the wanted tensors are there, in their shapes, as floating point numbers of one precision.

    `called` gives the name that a file has for a wanted tensor.
    """
    usual = Counter(tensor.dtype for tensor in found.values()).most_common(1)[0][0] if found else ""
    files = sorted({tensor.file for tensor in found.values()})
    where = files[0] if len(files) == 1 else files[0].parent if files else what
    missing = [name for name in wanted if name not in found]
    if missing:
        count = f"{len(missing)} of {len(wanted)}"
        raise ValueError(f"{where}: tensor {called(missing[0])} of the {what} is missing ({count}); fetch the folder again")
    for name, tensor in found.items():
        if name not in wanted:
            raise ValueError(f"{tensor.file}: tensor {tensor.name} has no place in the {what}; the file is for another model")
        if tensor.shape != tuple(wanted[name]):
            raise ValueError(
                f"{tensor.file}: tensor {tensor.name} has shape {list(tensor.shape)}, the {what} needs {list(wanted[name])}; "
                "the file is damaged or for another model"
            )
        if tensor.dtype not in FLOATS:
            kinds = ", ".join(FLOATS)
            raise ValueError(f"{tensor.file}: tensor {tensor.name} is {tensor.dtype}, not one of {kinds}; fetch the original file")
        if tensor.dtype != usual:
            raise ValueError(f"{tensor.file}: tensor {tensor.name} is {tensor.dtype}, the others are {usual}; fetch the original file")


def read(tensors: Iterable[Stored]) -> Iterator[tuple[Stored, Tensor]]:
    """The tensors one after the other, mapped from their files. A file is opened for a few that stand together and closed again, so
    that memory is given back once nobody holds them."""
    for path, some in groupby(tensors, key=lambda tensor: tensor.file):
        for portion in portions(some, MAPPED_BYTES):
            if path.suffix == ".safetensors":
                try:
                    with safe_open(str(path), framework="pt") as file:
                        for stored in portion:
                            beat()
                            yield stored, file.get_tensor(stored.name)
                except (SafetensorError, OSError) as error:
                    raise ValueError(f"{path} cannot be read to its end ({error}); fetch it again") from error
            else:
                held = _pickled(path)
                for stored in portion:
                    yield stored, held.pop(stored.name)


def portions(tensors: Iterable[Stored], limit: int) -> Iterator[list[Stored]]:
    """The tensors in order, as many at a time as have that many bytes together; a larger one alone."""
    portion, size = [], 0
    for stored in tensors:
        if portion and size + stored.nbytes > limit:
            yield portion
            portion, size = [], 0
        portion.append(stored)
        size += stored.nbytes
    if portion:
        yield portion


def write(path: Path, parts: Mapping[str, tuple[str, tuple[int, ...]]], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """A safetensors file of tensors that are made one at a time, `parts` being their dtypes and shapes in that order; it has its name
    only when it is whole."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in parts.items():
        start, end = end, end + prod(shape) * WIDTHS[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % HEADER_STEP)
    partial = path.with_name(f"{path.name}.part")
    with partial.open("wb") as out:
        out.write(len(text).to_bytes(HEADER_STEP, "little") + text)
        for name, (made, tensor) in zip(parts, tensors, strict=True):
            assert (made, SAFETENSORS_NAMES[tensor.dtype], tuple(tensor.shape)) == (name, *parts[name])
            out.write(tensor.contiguous().flatten().view(torch.uint8).numpy())
        out.flush()
        os.fsync(out.fileno())
    partial.rename(path)


def sha256(path: Path) -> str:
    """Hash of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _pickled(path: Path) -> dict[str, Tensor]:
    """Tensors of a .pth file, mapped and not read; nothing in it is run."""
    whole = is_zipfile(path)  # files of before torch 1.6 are none, and cannot be mapped
    try:
        if not whole and _begins(path, ZIP):
            raise EOFError("its end is missing")
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=whole)
    except UnpicklingError as error:
        raise ValueError(f"{path} holds something else than tensors, and nothing of it was run; fetch the original") from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is cut short or not a file of tensors ({str(error).splitlines()[0]}); fetch it again") from error
    strange = [str(name) for name, value in held.items() if not isinstance(value, Tensor)] if isinstance(held, dict) else ["everything"]
    if strange:
        raise ValueError(f"{path}: {strange[0]} is not a tensor; fetch the original file")
    return held


def _begins(path: Path, start: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(start)) == start


def _dtype_name(tensor: Tensor) -> str:
    return SAFETENSORS_NAMES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
