"""How the process holds memory it has freed: for its next use, where glibc would give it back and fetch it anew at every forward."""

from __future__ import annotations

import ctypes
import platform

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # mallopt's parameters, malloc.h
KEPT, APART = 256 << 20, 32 << 20  # bytes: freed ones that stay at the top of the heap; from here on (its highest) outside of the heap


def keep_freed_memory() -> bool:
    """Let the allocator keep up to 256 MiB of what is freed; False where it is not glibc's.

    The activations of a forward are freed by its end: given back to the system, each of their pages faults again in the next
    one, which costs a narrow transformer a fifth of its time. Arrays of 32 MiB and more still come and go by themselves.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(MMAP_THRESHOLD, APART) and mallopt(TRIM_THRESHOLD, KEPT))
