"""The folder of the program's files, and its commands as words: for messages in the form the user started them, for new processes."""

from __future__ import annotations

import os
import shlex
import sys
from importlib import resources
from pathlib import Path

LAUNCHERS = {"check": "check_device"}  # files in launch/ that are not named as their command
PACKAGE = Path(str(resources.files("sonic")))


def data_root() -> Path:
    """The folder that contains conf/ and recipes/: the package when installed from a wheel, otherwise the checkout around it."""
    return PACKAGE if (PACKAGE / "conf").is_dir() else PACKAGE.parent


def written(command: str, *, starter: str = "") -> str:
    """A command as the user would type it, in the form in which this process was started; `starter` such as torchrun precedes it."""
    started = Path(sys.argv[0])
    if started.parent.name == "launch" and started.suffix == ".py":
        return f"{starter or 'python'} {shlex.quote(str(started.with_name(f'{LAUNCHERS.get(command, command)}.py')))}"
    by_module = starter or (started.parent.name, started.name) == (PACKAGE.name, "__main__.py")
    return f"{starter or 'python'} -m sonic {command}" if by_module else f"sonic {command}"


def interpreter() -> list[str]:
    """The words that start Python in a new process with this process's import path, whatever its working folder."""
    import_path = os.pathsep.join(str(Path(folder).absolute()) for folder in sys.path)
    return ["env", "PYTHONSAFEPATH=1", f"PYTHONPATH={import_path}", sys.executable]


def command_words(command: str, *starter: str) -> list[str]:
    """The words that run a command in a new process; `starter` such as -m torch.distributed.run precedes it."""
    return [*interpreter(), *starter, "-m", "sonic", command]
