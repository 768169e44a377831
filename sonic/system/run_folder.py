"""The folder of one run: resolved config, command, git commit and log. It is made late, and removed when the run fails."""

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
from sonic.system.files import PARTIAL, temporary, written_temporary
from sonic.system.paths import shown

CONFIG, LOG, ATTEMPTS = "config.yaml", "log.txt", 10_000

log = logging.getLogger("sonic")


class Run:
    """The folder of a run's results. `open` makes it on the main rank; `discard` removes what `open` made, unless `keep` was called.

    In a folder that existed before, files have temporary names until `keep` is called, so a run that fails changes nothing there.
    """

    def __init__(self, location: tuple[str, str], config_yaml: str, *, command: list[str], root: Path, ranks: Ranks) -> None:
        folder, self._named = Path(location[0]), location[1]
        self.path = folder / (self._named or time.strftime("%Y%m%d-%H%M%S"))
        self.command = shlex.join(command)
        self.ranks, self.main, self.kept = ranks, ranks.rank == 0, False
        self._root, self._config_yaml = root, config_yaml
        self._made: list[Path] = []
        self._temporary: dict[Path, Path] = {}  # final path of a file -> its temporary path
        self._inode = 0  # of the run's config.yaml, once that is written
        self._handler: _LogFile | None = None

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.path.name

    @property
    def commit(self) -> str:
        """The git commit of the program, with "+changes" when files differ from it; the version when the program is not a clone."""
        prefix, _, commit = _git(self._root, "rev-parse", "--show-prefix", "HEAD").partition("\n")
        if prefix or not commit:  # an installed package, perhaps inside another repository
            return f"version {__version__}"
        return f"{commit}+changes" if _git(self._root, "status", "--porcelain", "-uno") else commit

    def open(self) -> Path:
        """Make the folder, write config, command and commit into it, and start logging to it. Gives its path.

        Without a name the folder is named by the time, with a number when another run has that name. Raises ValueError when it cannot
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
            message = f"run.folder={self.path.parent}: the folder {self.path} of the run cannot be written ({error.strerror})"
            raise ValueError(f"{message}; free some space there or choose another with run.folder=") from error
        return self.path

    def keep(self) -> None:
        """Keep the folder and its files from now on, even if the run fails later."""
        self.kept = True
        if self._temporary:
            log_temporary, handler = self._temporary.pop(self.path / LOG), self._handler
            with self.sparing(f"config and log of {self.name}", "the result"):
                self.close()
                with (self.path / LOG).open("a") as log_file:
                    log_file.write(log_temporary.read_text())
                for final, partial in self._temporary.items():
                    partial.replace(final)
            for partial in (log_temporary, *self._temporary.values()):
                partial.unlink(missing_ok=True)
            self._temporary = {}
            if handler:
                self._log_to(self.path / LOG)

    @contextmanager
    def sparing(self, what: str, result: str) -> Iterator[None]:
        """Inside the `with` block, an OSError while writing `what` becomes a warning, because `result` itself is already written."""
        try:
            yield
        except OSError as error:
            log.warning("run folder %s: %s cannot be written (%s); %s is complete", self.path, what, error.strerror or error, result)

    def write_json(self, name: str, value: dict) -> None:
        """Write a JSON file into the folder, on the main rank only."""
        if self.main:
            with written_temporary(self.path / name) as partial:
                partial.write_text(json.dumps(value, indent=2) + "\n")

    def close(self) -> None:
        """Stop logging to the folder, and remove temporary files unless the run is kept."""
        if self._handler:
            log.removeHandler(self._handler)
            self._handler.close()
            self._handler = None
        if not self.kept:
            for partial in self._temporary.values():
                partial.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove every folder that `open` made, unless the run is kept: its own, and `runs/` when nothing else is in it."""
        self.close()
        if self.kept:
            return
        for folder in self._made:
            if folder == self.path and not self._taken_over():
                shutil.rmtree(folder, ignore_errors=True)
            elif folder.is_dir() and not any(folder.iterdir()):
                with suppress(OSError):  # another run has started in it meanwhile
                    folder.rmdir()
        self._made = []

    def _make_folder(self) -> bool:
        """Make the folder and its parents; False when it existed already, which is allowed only for a run with a name."""
        first = self.path
        for count in range(1, ATTEMPTS):
            self.path = first if self._named or count == 1 else first.with_name(f"{first.name}-{count}")
            with suppress(FileNotFoundError):  # a parent was just removed, by a run that failed
                for parent in reversed(self.path.parents):
                    self._make(parent)
                if self._make(self.path) or self._named:
                    return self.path in self._made
        raise FileExistsError(errno.EEXIST, "no number is free")

    def _make(self, folder: Path) -> bool:
        """Make a folder; False when it exists already."""
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
        """The path to write a file to: the final one when the folder is new or the run is kept, a temporary one otherwise."""
        final = self.path / name
        if new or self.kept:
            return final
        return self._temporary.setdefault(final, temporary(final))

    def _taken_over(self) -> bool:
        """Whether another run of the same name has written its own files to the folder, or has started to."""
        config = self.path / CONFIG
        replaced = self._inode and config.is_file() and config.stat().st_ino != self._inode
        return bool(replaced) or any(self.path.glob(f".{CONFIG}.*{PARTIAL}"))

    def _log_to(self, path: Path) -> None:
        self._handler = _LogFile(path)
        self._handler.setFormatter(_Shown("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        log.addHandler(self._handler)


class _LogFile(logging.FileHandler):
    """A log file that is no longer written after its first failure, which is reported once."""

    full = False

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, unless writing has failed before."""
        if not self.full:
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Report the failure of a write as a warning."""
        if isinstance(error := sys.exc_info()[1], OSError):
            self.full = True
            log.warning("%s ends here: %s", self.baseFilename, error.strerror)
        else:
            super().handleError(record)

    def close(self) -> None:
        """Close the file; after a reported failure, errors of closing are ignored."""
        with suppress(OSError) if self.full else nullcontext():
            super().close()


def start_logging(*, main: bool) -> None:
    """Send log messages to stdout as plain sentences, warnings and errors to stderr; ranks other than the main one log errors only."""
    log.handlers.clear()
    log.propagate = False
    log.setLevel(logging.INFO if main else logging.CRITICAL)
    info, warning = logging.StreamHandler(sys.stdout), logging.StreamHandler(sys.stderr)
    info.addFilter(lambda record: record.levelno < logging.WARNING)
    info.setFormatter(_Shown())
    warning.setLevel(logging.WARNING)
    warning.setFormatter(_OneLine())
    for handler in (info, warning):
        log.addHandler(handler)
    warnings.filterwarnings("always", category=UserWarning)
    warnings.showwarning = _show_warning


def _show_warning(message: Warning | str, category: type[Warning], filename: str, *_) -> None:
    """Log a Python warning: one of this program as a warning, one of another package at debug level."""
    ours = Path(filename).is_relative_to(Path(__file__).parents[1]) and issubclass(category, UserWarning)
    log.log(logging.WARNING if ours else logging.DEBUG, "%s", message)


class _Shown(logging.Formatter):
    """The message in a form that any terminal and file can hold, whatever file names it contains."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))


class _OneLine(_Shown):
    """The level and the message on one line, with a traceback below it where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        return f"sonic: {record.levelname.lower()}: {super().format(record)}"


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.rstrip() if done.returncode == 0 else ""
