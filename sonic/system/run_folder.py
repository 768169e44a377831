"""The folder of one run: resolved config, command, git commit and log. A run that fails leaves nothing there."""

from __future__ import annotations

import errno
import json
import logging
import shlex
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from logging.handlers import MemoryHandler
from pathlib import Path

from sonic import __version__
from sonic.config import Ranks
from sonic.system.files import written_temporary
from sonic.system.paths import printable

ATTEMPTS = 10_000  # to make a folder that no other run has
ROOM = 12 << 10  # bytes that a folder must take: config, command and log
NEVER = sys.maxsize
START_FILES = ("config.yaml", "command.txt", "git_commit.txt")

log = logging.getLogger("sonic")


class Run:
    """The folder of a run's results. `open` makes it on the main rank, `keep` writes config, command, commit and log into it; before
    that the log is held in memory, so that a run that fails changes nothing."""

    def __init__(self, location: tuple[str, str], config_yaml: str, *, command: list[str], root: Path, ranks: Ranks) -> None:
        folder, self._named = Path(location[0]), location[1]
        self.path = folder / (self._named or time.strftime("%Y%m%d-%H%M%S"))
        self.command = shlex.join(command)
        self.ranks, self.main, self.kept = ranks, ranks.rank == 0, False
        self._root, self._config_yaml = root, config_yaml
        self._continues = False
        self._made: list[Path] = []  # folders, the innermost first
        self._log: MemoryHandler | None = None

    @property
    def commit(self) -> str:
        """The git commit of the program, with "+changes" when files differ from it; the version when the program is not a clone."""
        prefix, _, commit = git(self._root, "rev-parse", "--show-prefix", "HEAD").partition("\n")
        if prefix or not commit:  # an installed package, perhaps inside another repository
            return f"version {__version__}"
        return f"{commit}+changes" if git(self._root, "status", "--porcelain", "-uno") else commit

    def open(self) -> Path:
        """Make the folder and start the log. Gives its path.

        Without a name the folder is named by the time, with a number when another run has that name. Raises ValueError when it cannot
        be made or written to.
        """
        if not self.main or self._log:
            return self.path
        try:
            self._make_folder()
            with tempfile.TemporaryFile(dir=self.path) as trial:
                trial.write(bytes(ROOM))
        except OSError as error:
            message = f"run.folder={self.path.parent}: the folder {self.path} of the run cannot be written ({error.strerror})"
            raise ValueError(f"{message}; free some space there or choose another with run.folder=") from error
        self._log = MemoryHandler(capacity=NEVER, flushLevel=NEVER)
        log.addHandler(self._log)
        if self.kept:
            self._write()
        return self.path

    def keep(self, *, continues: bool = False) -> None:
        """Write what belongs into the folder, now or as soon as it is open. It stays even if the run fails later.

        In a folder that `continues`, config, command and commit of the starts before go to starts/0001, 0002 and so on.
        """
        self._continues = continues
        if self._log and not self.kept:
            self._write()
        self.kept = True

    @contextmanager
    def warn_if_unwritten(self, what: str, result: str) -> Iterator[None]:
        """Inside the `with` block, an OSError while writing `what` becomes a warning, because `result` itself is already written."""
        try:
            yield
        except OSError as error:
            log.warning("run folder %s: %s cannot be written (%s); %s is complete", self.path, what, error.strerror or error, result)

    def write_json(self, name: str, value: dict) -> None:
        """Write a JSON file into the folder, on the main rank only."""
        if self.main:
            self._write_text(name, json.dumps(value, indent=2))

    def close(self) -> None:
        """Stop logging to the folder, and remove the folders that `open` made if they are empty: nothing was kept."""
        if self._log:
            log.removeHandler(self._log)
            if self._log.target:
                self._log.target.close()
            self._log = None
        for folder in self._made:
            with suppress(OSError):  # it has files, of this run or of another
                folder.rmdir()

    def _make_folder(self) -> None:
        """Make the folder and its parents; that of a run with a name may exist already."""
        first = self.path
        for count in range(1, ATTEMPTS):
            self.path = first if self._named or count == 1 else first.with_name(f"{first.name}-{count}")
            with suppress(FileNotFoundError):  # a parent was just removed, by a run that failed
                for folder in (*reversed(self.path.parents), self.path):
                    with suppress(FileExistsError):
                        folder.mkdir()
                        self._made.insert(0, folder)
                if self._named or self.path in self._made:
                    return
        raise FileExistsError(errno.EEXIST, "no number is free")

    def _write(self) -> None:
        """Write config, command, commit and the log so far, and log to a file from now on."""
        with self.warn_if_unwritten(f"config and log of {self.path.name}", "the result"):
            if self._continues:
                self._number_last_start()
            for name, text in zip(START_FILES, (self._config_yaml.rstrip(), self.command, self.commit), strict=True):
                self._write_text(name, text)
            file = _LogFile(self.path / "log.txt")
            file.setFormatter(_Printable("%(asctime)s %(levelname)s %(name)s: %(message)s"))
            self._log.setTarget(file)
            self._log.capacity = 1
            self._log.flush()

    def _number_last_start(self) -> None:
        """Move the files of the last start, if there was one, to starts/ under the next number."""
        files = [file for name in START_FILES if (file := self.path / name).is_file()]
        if files:
            starts = self.path / "starts"
            folder = starts / f"{len(list(starts.glob('*'))) + 1:04d}"
            folder.mkdir(parents=True)
            for file in files:
                file.rename(folder / file.name)

    def _write_text(self, name: str, text: str) -> None:
        with written_temporary(self.path / name) as partial:
            partial.write_text(f"{text}\n")


class _LogFile(logging.FileHandler):
    """A log file that ends at its first failure, which is reported once."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Report the failure of a write as a warning."""
        if isinstance(error := sys.exc_info()[1], OSError):
            self.addFilter(lambda record: False)
            log.warning("%s ends here: %s", self.baseFilename, error.strerror)
        else:
            super().handleError(record)

    def close(self) -> None:
        """Close the file; what could not be written was reported."""
        with suppress(OSError):
            super().close()


def start_logging(*, main: bool) -> None:
    """Send log messages to stdout as plain sentences, warnings and errors to stderr; ranks other than the main one log errors only."""
    log.handlers.clear()
    log.propagate = False
    log.setLevel(logging.INFO if main else logging.CRITICAL)
    info, warning = logging.StreamHandler(sys.stdout), logging.StreamHandler(sys.stderr)
    info.addFilter(lambda record: record.levelno < logging.WARNING)
    info.setFormatter(_Printable())
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


class _Printable(logging.Formatter):
    """The message in a form that any terminal and file can hold, whatever file names it contains."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class _OneLine(_Printable):
    """The level and the message on one line, with a traceback below it where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        return f"sonic: {record.levelname.lower()}: {super().format(record)}"


def git(root: Path, *arguments: str) -> str:
    """What git prints for the clone at `root`; "" where it is missing or fails."""
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.rstrip() if done.returncode == 0 else ""
