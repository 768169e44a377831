"""Cache folders of packages: a temporary folder of this user when neither the packages nor the home folder are writable."""

from __future__ import annotations

import os
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from mounts import script, with_mounts

from sonic.system import caches

RESAMPLES = """
import os
import numpy as np
from sonic.data.audio import log_mel, resample
print(resample(np.ones(1000, np.float32), 8000, 16000).shape, log_mel(np.ones(16000, np.float32), 25).shape)
print(os.environ.get("NUMBA_CACHE_DIR"))
"""


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """No home folder, read-only packages, and a temporary folder."""
    for name in (*caches.HOME_CACHES, "NUMBA_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", "/proc/none")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(caches, "_folder_of", lambda package: Path("/proc/none"))
    (tmp_path / "temporary").mkdir()
    return tmp_path / "temporary"


def test_sound_is_read_on_a_read_only_image_without_a_home(tmp_path):
    packages = Path(find_spec("librosa").origin).parents[1]
    mounts = [["--bind", str(packages), str(packages)], ["-o", "remount,ro,bind", str(packages)]]
    environment = {"HOME": "/proc/none", "TMPDIR": str(tmp_path), "XDG_CACHE_HOME": "", "NUMBA_CACHE_DIR": ""}
    found = with_mounts(mounts, script(RESAMPLES), folder=tmp_path, environment=environment)
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[0] == "(2000,) (50, 40)"


def test_caches_go_to_one_temporary_folder_of_this_user(nowhere):
    caches.make_room_for_caches.__wrapped__()
    folder = nowhere / f"sonic-caches-{os.getuid()}"
    assert {os.environ[name] for name in (*caches.HOME_CACHES, "NUMBA_CACHE_DIR")} == {
        str(folder / name.lower()) for name in (*caches.HOME_CACHES, "NUMBA_CACHE_DIR")
    }
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_others_may_write_to_is_not_trusted(nowhere):
    shared = nowhere / f"sonic-caches-{os.getuid()}"
    shared.mkdir()
    shared.chmod(0o777)
    caches.make_room_for_caches.__wrapped__()
    own = Path(os.environ["NUMBA_CACHE_DIR"]).parent
    assert own.parent == nowhere and own != shared and own.stat().st_mode & 0o777 == 0o700
    shared.rmdir()
    shared.symlink_to(nowhere.parent)
    assert caches._own_folder() not in (shared, None)


def test_cache_folders_set_in_the_environment_are_kept(nowhere, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", "elsewhere")
    caches.make_room_for_caches.__wrapped__()
    assert os.environ["NUMBA_CACHE_DIR"] == "elsewhere"


def test_with_a_writable_home_packages_keep_their_own_cache_folders(nowhere, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    before = dict(os.environ)
    caches.make_room_for_caches.__wrapped__()
    assert dict(os.environ) == before and list(nowhere.iterdir()) == []
