"""Where the files of the program are, and how its commands are written: for people as they started it, for processes as they run."""

from __future__ import annotations

import os
import shlex
import sys
from importlib import resources
from pathlib import Path

PACKAGE = Path(str(resources.files("sonic")))


def data_root() -> Path:
    """The folder that holds conf/ and recipes/: the package itself where a wheel was installed, otherwise the checkout around it."""
    return PACKAGE if (PACKAGE / "conf").is_dir() else PACKAGE.parent


def written(command: str, *, starter: str = "") -> str:
    """How a person writes a command, in the way in which this process was started; `starter` such as torchrun goes before it."""
    started = Path(sys.argv[0])
    if started.parent.name == "launch" and started.suffix == ".py":
        return f"{starter or 'python'} {shlex.quote(str(started.with_name(f'{command}.py')))}"
    by_module = starter or (started.parent.name, started.name) == (PACKAGE.name, "__main__.py")
    return f"{starter or 'python'} -m sonic {command}" if by_module else f"sonic {command}"


def interpreter() -> list[str]:
    """The words that start Python in a process of its own, which imports from where this one does, whatever folder it runs in."""
    places = os.pathsep.join(str(Path(place).absolute()) for place in sys.path)
    return ["env", "PYTHONSAFEPATH=1", f"PYTHONPATH={places}", sys.executable]


def process(command: str, *starter: str) -> list[str]:
    """The words that run a command in a process of its own; `starter` such as -m torch.distributed.run goes before it."""
    return [*interpreter(), *starter, "-m", "sonic", command]
