"""Freed memory stays with the process, so that new allocations cause no page faults."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COUNT = """
import ctypes, resource, sys
from sonic.system.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def use():  # six activations of 6 MiB, each page of them touched, and gone again
    held = [libc.malloc(6 << 20) for _ in range(6)]
    for place in held:
        ctypes.memset(place, 1, 6 << 20)
    for place in held:
        libc.free(place)
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is told anything")
def test_freed_memory_is_reused_without_page_faults():
    def faults(how: str) -> int:
        found = subprocess.run([sys.executable, "-c", COUNT, how], cwd=ROOT, capture_output=True, text=True, check=True)
        return int(found.stdout)

    kept, returned = faults("kept"), faults("returned")
    assert kept < 500 and returned > 5000, (kept, returned)
