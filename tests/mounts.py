"""Runs a command with full disks or read-only folders, in a mount namespace of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@cache
def mounts_are_allowed() -> bool:
    """Whether this user may create mount namespaces."""
    try:
        return not subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False).returncode
    except FileNotFoundError:
        return False


def with_mounts(mounts: list[list[str]], command: list[str], **named) -> subprocess.CompletedProcess:
    """Run a command after `mount` with these arguments, in a mount namespace that ends with it."""
    if not mounts_are_allowed():
        pytest.skip("nothing can be mounted here: that takes root and unshare")
    script = " && ".join([*(f"mount {' '.join(each)}" for each in mounts), 'exec "$@"'])
    return ran(["unshare", "-m", "sh", "-c", script, "sh", *command], **named)


def ran(command: list[str], *, folder: Path, environment: dict[str, str] | None = None, **named) -> subprocess.CompletedProcess:
    """Run a command in a folder with this tree's sonic and the helpers of the tests."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    given = {**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1", **(environment or {})}
    out = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **named}
    return subprocess.run(command, cwd=folder, env=given, text=True, check=False, timeout=300, **out)


def script(text: str) -> list[str]:
    """A command of a few lines of Python."""
    return [sys.executable, "-c", text]
