"""A place for what packages cache, where neither their own folders nor the home take any: a read-only image, a user without a home."""

from __future__ import annotations

import atexit
import os
import shutil
import stat
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path

HOME_CACHES = {  # variables that packages read -> where they keep things otherwise, from the home
    "MPLCONFIGDIR": ".config/matplotlib",
    "TRITON_CACHE_DIR": ".triton/cache",
    "TORCHINDUCTOR_CACHE_DIR": ".cache/torch/inductor",
    "TORCH_EXTENSIONS_DIR": ".cache/torch_extensions",
    "HF_HOME": ".cache/huggingface",
}
READ_TOO = ("HF_HOME",)  # what somebody has filled serves well, whether it takes more or not
IN_MEMORY = "/dev/shm"  # the one place that a container without a temporary folder may have


@cache
def make_room_for_caches() -> None:
    """Name a temporary folder of this user to the packages that find no place for their caches; what the environment says stays.

    numba compiles functions of librosa when that is imported, and gives up where it cannot keep them.
    """
    home = Path(os.path.expanduser("~"))
    wanted = [name for name, place in HOME_CACHES.items() if not _serves(name, home / place)]
    numba = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    if not _takes_files(numba) and not _takes_files(_folder_of("librosa")):
        wanted.append("NUMBA_CACHE_DIR")
    missing = [name for name in wanted if name not in os.environ]
    if missing and (folder := _own_folder()):
        os.environ.update({name: str(folder / name.lower()) for name in missing})


def _serves(name: str, folder: Path) -> bool:
    return _takes_files(folder) or name in READ_TOO and folder.is_dir()


def _folder_of(package: str) -> Path:
    """Where a package lies, without importing it; "" where it is not installed."""
    found = find_spec(package)
    return Path(found.submodule_search_locations[0] if found else "")


def _takes_files(folder: Path) -> bool:
    """Whether a file can be made in a folder, or in the nearest above it that there is; never in one whose home is unknown."""
    if not folder.is_absolute():
        return False
    existing = next((each for each in (folder, *folder.parents) if each.is_dir()), None)
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError:
        return False
    return True


def _own_folder() -> Path | None:
    """A temporary folder that belongs to this user alone, the same at every start where that can be; None where none can be made."""
    try:
        top = Path(tempfile.gettempdir())
    except FileNotFoundError:
        top = Path(IN_MEMORY)
    shared = top / f"sonic-caches-{os.getuid()}"
    try:
        shared.mkdir(mode=0o700, exist_ok=True)
        told = shared.lstat()
        if stat.S_ISDIR(told.st_mode) and told.st_uid == os.getuid() and not told.st_mode & 0o022 and _takes_files(shared):
            return shared  # code is kept in it: a folder that others may write to is not trusted
    except OSError:
        pass  # somebody else's, or nothing takes files: the next lines say
    try:
        own = Path(tempfile.mkdtemp(prefix="sonic-caches-", dir=top))
    except OSError:
        return None
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    return own
