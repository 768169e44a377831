"""The folder of one run: resolved config, command, git commit and log; made late, and gone again when nothing came of it."""

from __future__ import annotations

import errno
import json
import logging
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from sonic import __version__
from sonic.config import Ranks
from sonic.system.files import PARTIAL, aside, written_aside
from sonic.system.paths import shown

CONFIG, LOG, ATTEMPTS = "config.yaml", "log.txt", 10_000

log = logging.getLogger("sonic")


class Run:
    """Where a run keeps its results. `open` makes the folder on the main rank; `discard` removes what `open` made, unless it is to
    be kept.

    In a folder that was there before, what the run writes stays aside until it is to be kept: a run that fails changes nothing.
    """

    def __init__(self, place: tuple[str, str], config_yaml: str, *, command: list[str], root: Path, ranks: Ranks) -> None:
        folder, self._named = Path(place[0]), place[1]
        self.path = folder / (self._named or time.strftime("%Y%m%d-%H%M%S"))
        self.command = shlex.join(command)
        self.ranks, self.main, self.kept = ranks, ranks.rank == 0, False
        self._root, self._config_yaml = root, config_yaml
        self._made: list[Path] = []
        self._aside: dict[Path, Path] = {}  # what it will be called -> where it is until then
        self._inode = 0  # of its config.yaml, once that is written
        self._handler: _LogFile | None = None

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
        """Make the folder, write what is known before the job starts, and let the log flow into it.

        Without a name it is called after the time, with a number where another run has that name. Raises ValueError where it cannot
        be made or written to.
        """
        if not self.main or self._handler:
            return self.path
        try:
            new = self._make_folder()
            texts = {CONFIG: self._config_yaml, "command.txt": f"{self.command}\n", "git_commit.txt": f"{self.commit}\n"}
            for name, text in texts.items():
                self._place(name, new=new).write_text(text)
            self._inode = self._place(CONFIG, new=new).stat().st_ino
            self._log_to(self._place(LOG, new=new))
        except OSError as error:
            said = f"run.folder={self.path.parent}: the folder {self.path} of the run cannot be written ({error.strerror})"
            raise ValueError(f"{said}; free some space there or choose another with run.folder=") from error
        return self.path

    def keep(self) -> None:
        """What the run has finished is worth keeping from now on, whatever happens."""
        self.kept = True
        if self._aside:
            log_aside, handler = self._aside.pop(self.path / LOG), self._handler
            with self.sparing(f"what goes with {self.name}", "what was made"):
                self.close()
                with (self.path / LOG).open("a") as whole:
                    whole.write(log_aside.read_text())
                for final, partial in self._aside.items():
                    partial.replace(final)
            for partial in (log_aside, *self._aside.values()):
                partial.unlink(missing_ok=True)
            self._aside = {}
            if handler:
                self._log_to(self.path / LOG)

    @contextmanager
    def sparing(self, what: str, result: str) -> Iterator[None]:
        """Something beside the result is written inside: where the folder takes no more, that is said, and the result counts."""
        try:
            yield
        except OSError as error:
            log.warning("run folder %s: %s cannot be written (%s); %s is whole", self.path, what, error.strerror or error, result)

    def write_json(self, name: str, value: dict) -> None:
        """A JSON file in the folder, on the main rank."""
        if self.main:
            with written_aside(self.path / name) as partial:
                partial.write_text(json.dumps(value, indent=2) + "\n")

    def close(self) -> None:
        """Stop logging into the folder; what is still aside goes."""
        if self._handler:
            log.removeHandler(self._handler)
            self._handler.close()
            self._handler = None
        if not self.kept:
            for partial in self._aside.values():
                partial.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove every folder that `open` made: the run, and `runs/` itself when nothing else is in it."""
        self.close()
        if self.kept:
            return
        for folder in self._made:
            if folder == self.path and not self._taken_over():
                shutil.rmtree(folder, ignore_errors=True)
            elif folder.is_dir() and not any(folder.iterdir()):
                with suppress(OSError):  # another run has begun there meanwhile
                    folder.rmdir()
        self._made = []

    def _make_folder(self) -> bool:
        """Make the folder and those above it; False when it was there, which only a name allows."""
        first = self.path
        for count in range(1, ATTEMPTS):
            self.path = first if self._named or count == 1 else first.with_name(f"{first.name}-{count}")
            with suppress(FileNotFoundError):  # what is above was just removed, by a run that failed
                for above in reversed(self.path.parents):
                    self._make(above)
                if self._make(self.path) or self._named:
                    return self.path in self._made
        raise FileExistsError(errno.EEXIST, "no number is free")

    def _make(self, folder: Path) -> bool:
        """Make a folder; False when it is there."""
        if folder.is_dir():
            return False
        try:
            folder.mkdir()
        except FileExistsError:
            if not folder.is_dir():
                raise
            return False
        self._made.insert(0, folder)
        return True

    def _place(self, name: str, *, new: bool) -> Path:
        """Where to write a file until the run is to be kept."""
        final = self.path / name
        if new or self.kept:
            return final
        return self._aside.setdefault(final, aside(final))

    def _taken_over(self) -> bool:
        """Whether another run of the same name has put its own files into the folder, or is about to."""
        config = self.path / CONFIG
        replaced = self._inode and config.is_file() and config.stat().st_ino != self._inode
        return bool(replaced) or any(self.path.glob(f".{CONFIG}.*{PARTIAL}"))

    def _log_to(self, path: Path) -> None:
        self._handler = _LogFile(path)
        self._handler.setFormatter(_Shown("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        log.addHandler(self._handler)


class _LogFile(logging.FileHandler):
    """A log that says once where it cannot be written, and is not written to again."""

    full = False

    def emit(self, record: logging.LogRecord) -> None:
        """Write, unless that has failed before."""
        if not self.full:
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Say why the log ends here."""
        if isinstance(error := sys.exc_info()[1], OSError):
            self.full = True
            log.warning("%s ends here: %s", self.baseFilename, error.strerror)
        else:
            super().handleError(record)

    def close(self) -> None:
        """Close the file; what it could not take is lost, which has been said."""
        with suppress(OSError) if self.full else nullcontext():
            super().close()


def start_logging(*, main: bool) -> None:
    """Messages of the program: plain sentences on stdout, warnings and errors on stderr; only errors of other ranks."""
    log.handlers.clear()
    log.propagate = False
    log.setLevel(logging.INFO if main else logging.CRITICAL)
    news, trouble = logging.StreamHandler(sys.stdout), logging.StreamHandler(sys.stderr)
    news.addFilter(lambda record: record.levelno < logging.WARNING)
    news.setFormatter(_Shown())
    trouble.setLevel(logging.WARNING)
    trouble.setFormatter(_OneLine())
    for handler in (news, trouble):
        log.addHandler(handler)
    warnings.filterwarnings("always", category=UserWarning)
    warnings.showwarning = _tell


def _tell(message: Warning | str, category: type[Warning], filename: str, *_) -> None:
    """Our own warnings are for the person, as one line; those of other packages are for whoever debugs."""
    ours = Path(filename).is_relative_to(Path(__file__).parents[1]) and issubclass(category, UserWarning)
    log.log(logging.WARNING if ours else logging.DEBUG, "%s", message)


class _Shown(logging.Formatter):
    """The message as any terminal and file can hold it, whatever the names in it are."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))


class _OneLine(_Shown):
    """Level and sentence; the traceback of a fault below it."""

    def format(self, record: logging.LogRecord) -> str:
        return f"sonic: {record.levelname.lower()}: {super().format(record)}"


def _git(root: Path, *arguments: str) -> str:
    try:
        found = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.rstrip() if found.returncode == 0 else ""
