"""What NVIDIA's driver says about this machine: its own version, and how the GPUs are linked. Standard library only."""

from __future__ import annotations

import re
import subprocess
from ctypes.util import find_library
from functools import cache
from pathlib import Path

DRIVER = Path("/proc/driver/nvidia/version")


def driver_version() -> str:
    """The version of the driver; "of unknown version" where only its library is found, "" without a driver."""
    text = DRIVER.read_text() if DRIVER.is_file() else _nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader")
    found = re.search(r"\d{3,}(\.\d+)+", text)
    return found[0] if found else "of unknown version" if find_library("cuda") else ""


@cache
def nvlinks() -> int:
    """The fewest NVLinks that connect any two GPUs of this machine; 0 where two have none, or where this cannot be read."""
    rows = [line.split() for line in _nvidia_smi("topo", "-m").splitlines() if line.startswith("GPU")]
    cells = [cell for row in rows for cell in row[1 : len(rows) + 1] if cell != "X"]
    return min((int(found[1]) if (found := re.fullmatch(r"NV(\d+)", cell)) else 0 for cell in cells), default=0)


def _nvidia_smi(*arguments: str) -> str:
    """What the command prints; "" where it is missing or fails."""
    try:
        return subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
