"""Names of files: expanding `~`, checking inputs and outputs, recognising two names of one file, and printing any name.

Standard library only.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path


def expanded(name: str) -> str:
    """The name with a leading `~` or `~user` replaced by the home folder, as in a shell; also in each of several names joined by `+`."""
    return "+".join(os.path.expanduser(part) for part in name.split("+"))


def printable(text: str) -> str:
    """The text in a form that any terminal, log and JSON file can hold: bytes that are not UTF-8 become \\xNN."""
    escaped = text.encode("utf-8", "backslashreplace").decode()
    return re.sub(r"\\udc([89a-f].)", r"\\x\1", escaped)  # which is how Python holds such a byte


def check_name(name: str | Path, option: str) -> None:
    """Raise ValueError when the name has characters that no file name can have."""
    try:
        possible = b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise ValueError(f"{option}={str(name)!a} holds a character that no file name can have; check the spelling")


def check_input(name: str | Path, option: str) -> None:
    """Raise ValueError when an input cannot be accessed, or is neither a file nor a folder: a named pipe or a device may never end.

    A missing input is accepted here; the code that reads it raises the error.
    """
    mode = _mode(name, option, "cannot be read")
    if mode and not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ValueError(f"{option}={name} is a {_kind(mode)}, not a file; save its content to a file and name that")


def file_key(name: str | Path) -> tuple[int, int] | str:
    """A key that is equal for two names of the same file, whatever their spelling: with `..`, symbolic links or hard links.

    It also works for a file that does not exist yet.
    """
    try:
        status = os.stat(name)
    except OSError:
        return os.path.realpath(name)
    return status.st_dev, status.st_ino


def write_target(path: Path, option: str) -> Path:
    """The file to write for this name: the target when the name is a symbolic link, which is not replaced.

    Raises ValueError when the name is taken by something other than a file, or by a read-only file.
    """
    mode = _mode(path, option, "cannot be written")
    if mode and not stat.S_ISREG(mode):
        raise ValueError(f"{option}={path} is a {_kind(mode)}, not a file; choose another name")
    if mode and not os.access(path, os.W_OK):
        raise ValueError(f"{option}={path} exists and is read-only; choose another name, or make it writable")
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def _mode(name: str | Path, option: str, fault: str) -> int:
    """The mode of what a name leads to; 0 when that does not exist. Raises ValueError when it cannot be found out."""
    check_name(name, option)
    try:
        return os.stat(name).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except OSError as error:
        raise ValueError(f"{option}={name} {fault} ({error.strerror}); choose another name") from error


def _kind(mode: int) -> str:
    kinds = {stat.S_IFIFO: "named pipe", stat.S_IFSOCK: "socket", stat.S_IFDIR: "folder"}
    return kinds.get(stat.S_IFMT(mode), "device")
