"""A temporary folder for the caches of packages, where their usual folders are not writable: a read-only image, a user without a home."""

from __future__ import annotations

import atexit
import os
import shutil
import stat
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path

HOME_CACHES = {  # environment variable of a package's cache -> its default folder, relative to the home
    "MPLCONFIGDIR": ".config/matplotlib",
    "TRITON_CACHE_DIR": ".triton/cache",
    "TORCHINDUCTOR_CACHE_DIR": ".cache/torch/inductor",
    "TORCH_EXTENSIONS_DIR": ".cache/torch_extensions",
    "HF_HOME": ".cache/huggingface",
}
READ_TOO = ("HF_HOME",)  # caches that are also useful when they are read-only
IN_MEMORY = "/dev/shm"  # used where there is no temporary folder, as in some containers


@cache
def make_room_for_caches() -> None:
    """Point packages whose cache folder is not writable to a temporary folder of this user, by environment variables not set yet.

    numba compiles functions of librosa when librosa is imported, and fails when it cannot cache them.
    """
    home = Path(os.path.expanduser("~"))
    readable = {name for name in READ_TOO if (home / HOME_CACHES[name]).is_dir()}
    wanted = [name for name, position in HOME_CACHES.items() if name not in readable and not _takes_files(home / position)]
    numba = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    if not _takes_files(numba) and not _takes_files(_folder_of("librosa")):
        wanted.append("NUMBA_CACHE_DIR")
    missing = [name for name in wanted if name not in os.environ]
    if missing and (folder := _own_folder()):
        os.environ.update({name: str(folder / name.lower()) for name in missing})


def _folder_of(package: str) -> Path:
    """The folder of a package, without importing it; "" when it is not installed."""
    found = find_spec(package)
    return Path(found.submodule_search_locations[0] if found else "")


def _takes_files(folder: Path) -> bool:
    """Whether a file can be made in a folder, or in its nearest parent that exists; False for a relative path, as without a home."""
    if not folder.is_absolute():
        return False
    existing = next((parent for parent in (folder, *folder.parents) if parent.is_dir()), None)
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError:
        return False
    return True


def _own_folder() -> Path | None:
    """A temporary folder that only this user can write to, the same one at every start if possible; None when none can be made."""
    try:
        top = Path(tempfile.gettempdir())
    except FileNotFoundError:
        top = Path(IN_MEMORY)
    shared = top / f"sonic-caches-{os.getuid()}"
    try:
        shared.mkdir(mode=0o700, exist_ok=True)
        status = shared.lstat()
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022 and _takes_files(shared):
            return shared  # it holds compiled code, so a folder that other users may write to is not trusted
    except OSError:
        pass  # it belongs to another user, or nothing can be written at all, which the next lines find out
    try:
        own = Path(tempfile.mkdtemp(prefix="sonic-caches-", dir=top))
    except OSError:
        return None
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    return own
