"""The folder of one run: resolved config, command, git commit and log; made late, and gone again when nothing came of it."""

from __future__ import annotations

import json
import logging
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

from sonic import __version__
from sonic.config import Ranks

log = logging.getLogger("sonic")


class Run:
    """Where a run keeps its papers. `open` makes the folder on the main rank; `discard` removes what `open` made, unless it is to
    be kept."""

    def __init__(self, place: tuple[str, str], config_yaml: str, *, command: list[str], root: Path, ranks: Ranks) -> None:
        folder, name = place
        self.path = _unused(Path(folder), name)
        self.command = shlex.join(command)
        self.ranks, self.main, self.kept = ranks, ranks.rank == 0, False
        self._root, self._config_yaml = root, config_yaml
        self._made: list[Path] = []
        self._handler: logging.Handler | None = None

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.path.name

    @property
    def commit(self) -> str:
        """The git commit of the program, "+changes" when its files differ from it; outside a clone of its own the version."""
        at_top, _, found = _git(self._root, "rev-parse", "--show-prefix", "HEAD").partition("\n")
        if at_top or not found:  # an installed package, maybe below somebody else's repository
            return f"version {__version__}"
        return f"{found}+changes" if _git(self._root, "status", "--porcelain", "-uno") else found

    def open(self) -> Path:
        """Make the folder, write what is known before the job starts, and let the log flow into it."""
        if not self.main or self._handler:
            return self.path
        missing = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        self._made = missing
        (self.path / "config.yaml").write_text(self._config_yaml)
        (self.path / "command.txt").write_text(self.command + "\n")
        (self.path / "git_commit.txt").write_text(self.commit + "\n")
        self._handler = logging.FileHandler(self.path / "log.txt")
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        log.addHandler(self._handler)
        return self.path

    def keep(self) -> None:
        """What the run has finished is worth keeping from now on, whatever happens."""
        self.kept = True

    def write_json(self, name: str, value: dict) -> None:
        """A JSON file in the folder, on the main rank."""
        if self.main:
            (self.path / name).write_text(json.dumps(value, indent=2) + "\n")

    def close(self) -> None:
        """Stop logging into the folder."""
        if self._handler:
            log.removeHandler(self._handler)
            self._handler.close()
            self._handler = None

    def discard(self) -> None:
        """Remove every folder that `open` made: the run, and `runs/` itself when nothing else is in it."""
        self.close()
        if self.kept:
            return
        if self.path in self._made:
            shutil.rmtree(self.path, ignore_errors=True)
        for folder in self._made[1:]:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        self._made = []


def start_logging(*, main: bool) -> None:
    """Messages of the program: plain sentences on stdout, warnings and errors on stderr; only errors of other ranks."""
    log.handlers.clear()
    log.propagate = False
    log.setLevel(logging.INFO if main else logging.CRITICAL)
    news, trouble = logging.StreamHandler(sys.stdout), logging.StreamHandler(sys.stderr)
    news.addFilter(lambda record: record.levelno < logging.WARNING)
    trouble.setLevel(logging.WARNING)
    trouble.setFormatter(_OneLine())
    for handler in (news, trouble):
        log.addHandler(handler)
    warnings.filterwarnings("always", category=UserWarning)
    warnings.showwarning = _tell


def _tell(message: Warning | str, category: type[Warning], filename: str, *_) -> None:
    """Our own warnings are for the person, as one line; those of other packages are for whoever debugs."""
    ours = Path(filename).is_relative_to(Path(__file__).parent) and issubclass(category, UserWarning)
    log.log(logging.WARNING if ours else logging.DEBUG, "%s", message)


class _OneLine(logging.Formatter):
    """Level and sentence; the traceback of a fault below it."""

    def format(self, record: logging.LogRecord) -> str:
        return f"sonic: {record.levelname.lower()}: {super().format(record)}"


def _unused(folder: Path, name: str) -> Path:
    """A named folder as it is (a second run overwrites); without a name, the time and a number that is free."""
    if name:
        return folder / name
    stamp = time.strftime("%Y%m%d-%H%M%S")
    candidates = (folder / (stamp if count == 1 else f"{stamp}-{count}") for count in range(1, 10_000))
    return next(path for path in candidates if not path.exists())


def _git(root: Path, *arguments: str) -> str:
    try:
        found = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.rstrip() if found.returncode == 0 else ""
