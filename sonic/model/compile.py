"""Compiled regions of the transformer: what its blocks compute between products and attentions, as a few kernels of torch.compile.

A region is a function or a module's forward. The layers that it calls through `Uncompiled.call` run as they are, with their hooks (of
FSDP and of offloading), adapters, caches and exchanges between ranks, and all layers use the same compiled code.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import cache, wraps
from importlib.util import find_spec
from typing import Any

import torch

from sonic.system.heartbeat import pause_watchdog

_COMPILING: ContextVar[bool] = ContextVar("regions run compiled", default=False)


class CompileTime:
    """How often torch has compiled something in this process, and how many seconds it took. Meanwhile the watchdog waits."""

    def __init__(self) -> None:
        self.number, self.seconds, self._begun, self._pause = 0, 0.0, 0.0, ExitStack()

    def begin(self, *given: Any) -> None:
        """A compilation begins."""
        self._begun = time.perf_counter()
        self._pause.enter_context(pause_watchdog())

    def end(self, *given: Any) -> None:
        """A compilation has ended."""
        self._pause.close()
        self.number += 1
        self.seconds += time.perf_counter() - self._begun


COMPILE_TIME = CompileTime()


class Uncompiled:
    """Calls layers that a region leaves as they are."""

    @staticmethod
    def call(layer: Callable, *given: Any, **named: Any) -> Any:
        """`layer(...)`."""
        return layer(*given, **named)


@contextmanager
def compiled_regions(on: bool) -> Iterator[None]:
    """Context in which regions run compiled, if `on`."""
    token = _COMPILING.set(on)
    try:
        yield
    finally:
        _COMPILING.reset(token)


def region(function: Callable) -> Callable:
    """A function of tensors that runs compiled inside `compiled_regions(True)` where no gradients are needed, and else as it is written."""

    @wraps(function)
    def run(*given: Any, **named: Any) -> Any:
        compiled = _COMPILING.get() and not torch.is_grad_enabled()
        return (_compiled(function) if compiled else function)(*given, **named)

    return run


def keeps_inputs() -> bool:
    """Whether inputs must not be overwritten: gradients need them, and the compiler decides itself where its results go."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling()


@cache
def _compiled(function: Callable) -> Callable:
    """The compiled function. Lengths that change between videos become variables of its kernels at the second one."""
    _prepare()
    return torch.compile(function)


@cache
def _prepare() -> None:
    """Import the compiler, which takes a second, and tell it what it leaves alone."""
    from torch._dynamo.callback import on_compile_end, on_compile_start

    on_compile_start(COMPILE_TIME.begin)
    on_compile_end(COMPILE_TIME.end)
    Uncompiled.call = staticmethod(torch.compiler.disable(Uncompiled.call))


def compile_folder() -> str:
    """The folder in which torch keeps what it has compiled, TORCHINDUCTOR_CACHE_DIR."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return cache_dir()


def missing_compiler(device: torch.device) -> str:
    """What torch.compile lacks to compile for a device; "" when it can."""
    if device.type == "cuda":
        lacking = "the package triton" if find_spec("triton") is None else "a C compiler (gcc)"
        return "" if find_spec("triton") and any(map(shutil.which, ("cc", "gcc", "clang"))) else lacking
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "a C++ compiler (g++)"
    return ""
