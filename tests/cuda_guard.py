"""Loads the device guard of fake CUDA into a process before torch, which asks once, as it is imported, whether there is a device."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from pathlib import Path


def load_guard(library: Path, path: list[str]) -> None:
    """Prepare the process that runs fake CUDA. A CUDA build of torch has a guard of its own."""
    sys.path[:] = path
    libraries = Path(importlib.util.find_spec("torch").origin).with_name("lib")
    if not (libraries / "libtorch_cuda.so").exists():
        for each in (libraries / "libc10.so", libraries / "libtorch_cpu.so", library):
            ctypes.CDLL(str(each), ctypes.RTLD_GLOBAL)
    importlib.import_module("torch").set_num_threads(1)
