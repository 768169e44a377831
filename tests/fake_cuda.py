"""A CUDA device that is not there: fake tensors on `cuda` run the real code, and a record says what would make the host wait, and where.

A CPU build of torch needs a device guard for it (`fake_cuda.cpp`), which a C++ compiler makes once. The guard changes the whole process,
so tests hand functions to another process: `fake_cuda(function, argument)` in a test whose name contains `fake_cuda`.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from cuda_guard import load_guard
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import SDPBackend
from torch.utils._pytree import tree_leaves

from sonic.system import device_stream

SOURCE = Path(__file__).with_suffix(".cpp")
CUDA = torch.device("cuda", 0)
ROOT = Path(__file__).parents[1] / "sonic"
ANSWERS = {torch.bool: True, torch.float32: 0.5, torch.float64: 0.5, torch.bfloat16: 0.5}  # `tensor.item()` by dtype; others: 0
VIEWS = """_reshape_alias _unsafe_view alias as_strided chunk collapse_view detach device diagonal empty empty_like empty_strided expand
is_pinned lift_fresh narrow permute select slice split split_dim split_with_sizes squeeze t transpose unbind unfold unsqueeze view
view_as_complex view_as_real"""
NO_KERNEL = frozenset(VIEWS.split())


@dataclass
class Record:
    """What a program asked of the device: `waits` of the host for it by (kind, line of sonic/), `copies` between the two in bytes by line,
    and for every operation with a kernel its launches and the bytes that it reads and writes."""

    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)
    traffic: Counter[str] = field(default_factory=Counter)

    def clear(self) -> None:
        """Begin anew."""
        for counter in (self.waits, self.copies, self.launches, self.traffic):
            counter.clear()


class FakeCuda(FakeTensorMode):
    """Tensors on `cuda` are fake, those on the CPU real, so that what the program decides on the host it decides; fills a `Record`."""

    avoid_device_init = True  # also where a test says that there is a GPU

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.record = Record()
        self.pinned: dict[int, Tensor] = {}  # by the address of its memory; kept, so that no address is used again

    def dispatch(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run one operation of torch: on values where all of it is on the CPU, else on shapes, and count it."""
        given, named = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)], kwargs or {}
        if not any(isinstance(tensor, FakeTensor) for tensor in given) and torch.device(named.get("device") or "cpu").type != "cuda":
            return self._pinned(func, args, named) if named.get("pin_memory") else func(*args, **named)
        if func is torch.ops.aten._local_scalar_dense.default:
            if given[0].is_cuda:
                self.record.waits["item", line_of_sonic()] += 1
            return ANSWERS.get(given[0].dtype, 0)
        out = super().dispatch(func, types, args, named)
        self._count(
            func.__name__.split(".")[0], given, [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)], given_flags(args, named)
        )
        return out

    def _pinned(self, func: Any, args: tuple, named: dict) -> Tensor:
        """A new tensor in memory that counts as pinned."""
        made = func(*args, **{**named, "pin_memory": False})
        self.pinned[made.untyped_storage().data_ptr()] = made
        return made

    def _is_pageable(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in host memory that is not pinned, from which a GPU copies only while the host waits."""
        fake = isinstance(tensor, FakeTensor)
        return not tensor.is_cuda and not fake and tensor.untyped_storage().data_ptr() not in self.pinned

    def _count(self, name: str, given: list[Tensor], made: list[Tensor], named: dict) -> None:
        if name in ("nonzero", "masked_select") and given[0].is_cuda:
            self.record.waits[name, line_of_sonic()] += 1
        if name.strip("_") in ("index", "index_put") and given[0].is_cuda and any(not each.is_cuda and each.ndim for each in given[1:]):
            self.record.waits["index from the host", line_of_sonic()] += 1
        pair = (made[0], given[0]) if name == "_to_copy" and made else (given[0], given[1]) if name == "copy_" and len(given) > 1 else None
        if pair and pair[0].device != pair[1].device:
            way, line = "to the device" if pair[0].is_cuda else "to the host", line_of_sonic()
            self.record.copies[line] += pair[1].nbytes
            if not (named.get("non_blocking") or True in named.values()) or self._is_pageable(pair[1]):
                self.record.waits[f"copy {way}", line] += 1
        elif name not in NO_KERNEL and any(tensor.is_cuda for tensor in (*given, *made)):
            self.record.launches[name] += 1
            read = [tensor for tensor in given if tensor is not named.get("out")][name == "copy_" :]  # which does not read its target
            self.record.traffic[name] += sum(tensor.nbytes for tensor in (*read, *made) if tensor.is_cuda)


def given_flags(args: tuple, named: dict) -> dict:
    """The named arguments of an operation, and those without a name that are true or false."""
    return {**named, **{index: each for index, each in enumerate(args) if isinstance(each, bool)}}


def line_of_sonic() -> str:
    """The innermost line of the library that is running, as FILE:NUMBER; of diffusers where the library called it."""
    frame = sys._getframe(1)
    while frame and not ((name := frame.f_code.co_filename).startswith(str(ROOT)) or "/diffusers/" in name):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else "outside"


@contextmanager
def fake_cuda_mode() -> Iterator[Record]:
    """Context in which tensors are fake and `cuda` is a device; in the process of the fixture `fake_cuda`.

    What has no fake counterpart is replaced: tensors made of Python values on the device (which wait for the copy), generators, and the
    choice of an attention kernel, which a CPU build of torch would make for a CPU.
    """
    tensor, as_tensor, new_tensor = torch.tensor, torch.as_tensor, Tensor.new_tensor
    attention, rms_norm = torch.nn.functional.scaled_dot_product_attention, torch.rms_norm
    host_generator = torch.Generator

    def on_host_first(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(data: Any, *args: Any, device: Any = None, **named: Any) -> Tensor:
            target = torch.device(device) if device is not None else None
            if target is None or target.type != "cuda" or isinstance(data, Tensor):
                return make(data, *args, **({} if device is None else {"device": device}), **named)
            mode.record.waits["tensor from Python values", line_of_sonic()] += 1
            return make(data, *args, **named).to(CUDA, non_blocking=True)

        return made

    def new(self: Tensor, data: Any, **named: Any) -> Tensor:
        if not self.is_cuda:
            return new_tensor(self, data, **named)
        return torch.tensor(data, **{"dtype": self.dtype, "device": self.device, **named})

    def values(self: FakeTensor) -> list:
        if self.is_cuda:
            mode.record.waits["copy to the host", line_of_sonic()] += 1
        return np.full(self.shape, ANSWERS.get(self.dtype, 0)).tolist()

    class Generator(host_generator):
        def __new__(cls, device: Any = "cpu") -> Any:
            if torch.device(device).type == "cpu":
                return host_generator(device)
            return SimpleNamespace(device=CUDA, manual_seed=lambda seed: SimpleNamespace(device=CUDA, initial_seed=lambda: seed))

    def without_generator(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, generator: Any = None, **named: Any) -> Tensor:
            return make(*args, **named, **({"generator": generator} if isinstance(generator, host_generator) else {}))

        return made

    def one_kernel(queries: Tensor, keys: Tensor, values: Tensor, attn_mask: Tensor | None = None, **named: Any) -> Tensor:
        if not queries.is_cuda:
            return attention(queries, keys, values, attn_mask, **named)
        learning = any(rows.requires_grad for rows in (queries, keys, values))
        return torch.ops.aten._scaled_dot_product_efficient_attention(queries, keys, values, attn_mask, learning, **named)[0]

    def fused_norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        """One kernel, as a CUDA build has; a CPU build would run seven."""
        if not x.is_cuda or torch.is_grad_enabled():
            return rms_norm(x, shape, weight, eps)
        out = torch.empty_like(x)
        mode._count("_fused_rms_norm", [x, weight], [out], {})
        return out

    class Waited(device_stream.HostEvent):
        def synchronize(self) -> None:
            mode.record.waits["event", line_of_sonic()] += 1

    class Stream(device_stream.DeviceStream):
        def record(self, *, timed: bool = False) -> device_stream.HostEvent:
            return Waited()

        def copy(self, target: Tensor, source: Tensor) -> None:
            target.copy_(source, non_blocking=True)

        def pin(self, memory: Tensor, owner: object) -> None:
            mode.pinned[memory.untyped_storage().data_ptr()] = memory

        def host_memory(self, like: Tensor) -> Tensor:
            return torch.empty_like(like, device="cpu")

    device_stream.stream_on.cache_clear()
    with (
        patch.dict(device_stream.STREAMS, {"cuda": Stream}),
        patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        patch.object(torch.cuda, "is_bf16_supported", lambda *args: True),
        patch.object(torch, "Generator", Generator),
        patch.object(torch.nn.functional, "scaled_dot_product_attention", one_kernel),
        patch.multiple(torch, rms_norm=fused_norm, _fused_sdp_choice=lambda *rows: SDPBackend.EFFICIENT_ATTENTION.value),
        patch.multiple(torch, tensor=on_host_first(tensor), as_tensor=on_host_first(as_tensor)),
        patch.multiple(torch, **{name: without_generator(getattr(torch, name)) for name in ("randn", "rand", "randint")}),
        patch.object(Tensor, "new_tensor", new),
        patch.object(FakeTensor, "tolist", values),
        FakeCuda() as mode,
    ):
        yield mode.record


def on_cuda(module: torch.nn.Module, dtype: torch.dtype | None = None) -> torch.nn.Module:
    """A module from the meta device with fake weights on `cuda`; its floating-point weights in `dtype`, where one is given."""
    for owner in module.modules():
        for name, value in [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]:
            kind = dtype if dtype and value.is_floating_point() else value.dtype
            made = torch.empty(value.shape, dtype=kind, device=CUDA)
            if isinstance(value, torch.nn.Parameter):
                owner._parameters[name] = torch.nn.Parameter(made, requires_grad=value.requires_grad)
            else:
                owner._buffers[name] = made
    return module


def compiled_guard(folder: Path) -> Path:
    """The compiled guard for this torch, made when it is not there. Skips the test without a C++ compiler."""
    from torch.utils.cpp_extension import include_paths, library_paths

    library = folder / f"guard-{torch.__version__}-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]}.so"
    if library.exists():
        return library
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if compiler is None:
        pytest.skip("fake CUDA needs a C++ compiler for its device guard; install g++")
    made = library.with_suffix(f".{os.getpid()}")
    torchs = [*(f"-I{path}" for path in include_paths()), *(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-lc10"]
    subprocess.run([compiler, "-O1", "-std=c++20", "-shared", "-fPIC", str(SOURCE), "-o", str(made), *torchs], check=True)
    made.replace(library)
    return library


@pytest.fixture(scope="module")  # because torch keeps what the planner's fake GPU registers in a process
def fake_cuda(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """Calls a function of a test module, by its name, with these arguments in a process where `fake_cuda_mode` works; gives its result."""
    library = compiled_guard(request.config.cache.mkdir("fake_cuda"))
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), load_guard, (library, sys.path)) as pool:
        yield lambda function, *args: pool.submit(function, *args).result()
