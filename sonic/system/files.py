"""Files that are written under a temporary name and renamed when complete, with the mode that the umask gives new files."""

from __future__ import annotations

import json
import os
import secrets
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

DEVICES = Path("/dev")  # where /dev/stdout is, which must not be replaced
NAME_CHARACTERS = 40  # of a file's name that its temporary name repeats, so that the longer name stays within the system's limit

if typing.TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def written_temporary(path: str | Path) -> Iterator[Path]:
    """A new empty file in the same folder, which is renamed to `path` when the `with` block succeeds and removed when it fails.

    An OSError from inside, such as that of a full disk, is raised again with `path` as its file name.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name[:NAME_CHARACTERS]}.{secrets.token_hex(6)}.partial")
    try:
        partial.touch(exist_ok=False)
        yield partial
        os.replace(partial, path)
    except OSError as error:
        if error.errno is not None:  # else the error is a sentence, which a file name would hide
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        partial.unlink(missing_ok=True)


def check_writable(path: str | Path, option: str) -> None:
    """Raise ValueError, before the work, when a file of this path could not be written after it; missing folders are made then."""
    path = Path(path).absolute()
    if path.exists() and not path.is_file() and not path.is_dir():
        return  # a pipe or a device
    folder = next(each for each in path.parents if each.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        reason = "cannot be written to" if folder.is_dir() else "is not a folder"
        raise ValueError(f"{option}={path} cannot be written: {folder} {reason}; choose a file elsewhere")


def write_json(value: object, path: str | Path) -> None:
    """Write a JSON file for people to read; its folder is made if it is missing. Pipes and devices are written to as they are."""
    path, text = Path(path), json.dumps(value, indent=1) + "\n"
    if DEVICES in path.parents or (path.exists() and not path.is_file()):
        path.write_text(text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_temporary(path) as partial:
        partial.write_text(text)


def save_tensors(tensors: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, with the usual mode even if the library makes it readable by its owner only.

    Raises OSError when the file cannot be written.
    """
    from safetensors import SafetensorError  # it imports torch, which writing text does not need
    from safetensors.torch import save_file

    with written_temporary(path) as partial:
        mode = partial.stat().st_mode
        try:
            save_file(dict(tensors), partial, None if metadata is None else dict(metadata))
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error
        if partial.stat().st_mode != mode:
            partial.chmod(mode)
