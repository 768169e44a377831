"""Names of files: what a person typed becomes a path, two names of one file are recognised, any name can be shown.

Standard library only.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path

_SURROGATE = re.compile("[\ud800-\udfff]")  # a byte of a file name that is not UTF-8 (U+DC80 to U+DCFF), or half a character
_ESCAPED = 0xDC80, 0xDCFF
_MISSING = (errno.ENOENT, errno.ENOTDIR)


def expanded(name: str) -> str:
    """The name with the home folder in the place of a leading `~` or `~user`, as a shell does it; so too each of several joined by `+`."""
    return "+".join(os.path.expanduser(each) for each in name.split("+"))


def shown(text: str) -> str:
    """The text as any terminal, log and JSON file can hold it: bytes that are not UTF-8 become \\xNN."""

    def escaped(found: re.Match) -> str:
        code = ord(found[0])
        return f"\\x{code - 0xDC00:02x}" if _ESCAPED[0] <= code <= _ESCAPED[1] else f"\\u{code:04x}"

    return _SURROGATE.sub(escaped, text)


def check_name(name: str | Path, option: str) -> None:
    """Raise ValueError when no file can have this name."""
    try:
        possible = b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise ValueError(f"{option}={str(name)!a} holds a character that no file name can have; check the spelling")


def check_input(name: str | Path, option: str) -> None:
    """Raise ValueError when an input is neither a file nor a folder, such as a named pipe or a device, which may never end, or cannot
    be looked at. What does not exist is left to whoever reads it."""
    check_name(name, option)
    try:
        mode = os.stat(name).st_mode
    except OSError as error:
        if error.errno in _MISSING:
            return
        raise ValueError(f"{option}={name} cannot be read ({error.strerror}); name another file") from error
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ValueError(f"{option}={name} is a {_kind(mode)} and no file; save what it gives to a file and name that")


def file_key(name: str | Path) -> tuple[int, int] | str:
    """What two names of one file have in common, however they are spelt: through `..`, symbolic links or a hard link, and before it
    is there too."""
    try:
        found = os.stat(name)
    except OSError:
        return os.path.realpath(name)
    return found.st_dev, found.st_ino


def write_target(path: Path, option: str) -> Path:
    """The file that is written under this name: that at the end of a symbolic link, which itself stays as it is.

    Raises ValueError when something other than a file, or a file that must not be written, is there already.
    """
    check_name(path, option)
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if error.errno not in _MISSING:
            raise ValueError(f"{option}={path} cannot be written ({error.strerror}); choose another name") from error
    else:
        if not stat.S_ISREG(mode):
            raise ValueError(f"{option}={path} is a {_kind(mode)} and no file; choose another name")
        if not os.access(path, os.W_OK):
            raise ValueError(f"{option}={path} is there already and read-only; choose another name, or make it writable")
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def _kind(mode: int) -> str:
    kinds = {stat.S_IFIFO: "named pipe", stat.S_IFSOCK: "socket", stat.S_IFDIR: "folder"}
    return kinds.get(stat.S_IFMT(mode), "device")
