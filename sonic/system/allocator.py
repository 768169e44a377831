"""Settings of glibc's allocator: the process keeps freed memory for its next forward instead of returning it to the system."""

from __future__ import annotations

import ctypes
import platform

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # mallopt's parameters, malloc.h
KEPT, APART = 256 << 20, 32 << 20  # bytes: free memory kept at the top of the heap; size from which (at most) arrays are mapped separately


def keep_freed_memory() -> bool:
    """Make the allocator keep up to 256 MiB of freed memory; False, without effect, where the allocator is not glibc's.

    The activations of a forward are freed at its end. If that memory returned to the system, every page of it would fault again in the
    next forward, which takes a fifth of the time of a narrow transformer. Arrays of 32 MiB and more are still returned.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(MMAP_THRESHOLD, APART) and mallopt(TRIM_THRESHOLD, KEPT))
