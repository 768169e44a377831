"""Files that appear whole or not at all, with the mode that the umask gives every new file."""

from __future__ import annotations

import os
import secrets
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"
NAME_CHARACTERS = 40  # of the name that a file will have: a longer one may have no room for what is added to it

if typing.TYPE_CHECKING:
    from torch import Tensor


def aside(path: Path) -> Path:
    """A name in the same folder that no other process, thread or machine takes."""
    return path.with_name(f".{path.name[:NAME_CHARACTERS]}.{secrets.token_hex(6)}{PARTIAL}")


@contextmanager
def written_aside(path: str | Path) -> Iterator[Path]:
    """A new, empty file to write what will be `path`: it takes that name when all went well and is gone otherwise.

    Raises OSError with that name where the system gives none, as on a full disk.
    """
    path = Path(path)
    partial = aside(path)
    try:
        partial.touch(exist_ok=False)
        yield partial
        os.replace(partial, path)
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise
    finally:
        partial.unlink(missing_ok=True)


def save_tensors(tensors: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, which its library may make for its owner's eyes alone. Raises OSError where it cannot be written."""
    from safetensors import SafetensorError  # torch: not for who only writes text
    from safetensors.torch import save_file

    with written_aside(path) as partial:
        mode = partial.stat().st_mode
        try:
            save_file(dict(tensors), partial, None if metadata is None else dict(metadata))
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error
        if partial.stat().st_mode != mode:
            partial.chmod(mode)
