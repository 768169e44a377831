"""The process and its terminal: output streams that survive the loss of their reader, and the signals that end the process."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

STREAMS = {"stdin": 0, "stdout": 1, "stderr": 2}
END_SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1  # Ctrl-C; a request; a closed terminal; Slurm before its limit
SAME_S = 3.0  # seconds in which more signals count as one: Slurm sends it to all processes, and torchrun repeats it to its children

_noted: list[tuple[int, float]] = []  # the first signal inside `signals_noted`, and when it came


class StopSignal(KeyboardInterrupt):
    """A signal asked the program to end; `code` is its exit code for that."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.code = exit_code_of(number)


class DiscardingFile(io.FileIO):
    """The file of an output stream: after a write fails, later output is discarded without an error.

    `failure` is the reason, or None when the reader of a pipe closed it or the terminal is gone.
    """

    failure: OSError | None = None

    def write(self, data) -> int:
        """Write `data`; when that fails, send this and all later output to /dev/null."""
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # a closed pipe, a terminal that is gone
                self.failure = OSError(error.errno, error.strerror, "stdout")  # the only stream whose failure is asked for
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            return memoryview(data).nbytes


def keep_streams_usable() -> None:
    """Make stdout and stderr usable after their reader has gone, on a full disk, and when they were closed from the start (`>&-`).

    The system would give free descriptors 0 to 2 to the next files that are opened, and the output of libraries would go into those.
    """
    for name, number in STREAMS.items():
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor, which is this one
        stream = getattr(sys, name)
        if name != "stdin":
            setattr(sys, name, _discarding(number, stream) if stream is not None else os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))


def _discarding(number: int, stream: io.TextIOWrapper) -> io.TextIOWrapper:
    stream.flush()
    file = io.BufferedWriter(DiscardingFile(number, "w", closefd=False))
    errors = "backslashreplace"  # names may hold bytes that are not UTF-8
    return io.TextIOWrapper(file, stream.encoding, errors, line_buffering=stream.line_buffering)


def failure_of_stdout() -> OSError | None:
    """The error that ended output to stdout; None when all of it was written, or its reader closed the pipe."""
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw.failure if isinstance(raw, DiscardingFile) else None


def exit_code_of(number: int) -> int:
    """The exit code of a program that a signal asked to end, as in a shell: 130 for SIGINT, 143 for SIGTERM; 0 without a signal."""
    return 128 + number if number else 0


def interrupt_on_signals() -> None:
    """Make the signals that end a program raise KeyboardInterrupt, so that incomplete files are removed.

    Signals that are ignored, such as SIGHUP under nohup, stay ignored. After the first signal all are ignored but Ctrl-C, so that they do
    not interrupt the cleanup.
    """
    for number in END_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)


@contextmanager
def signals_noted(notice: str) -> Iterator[None]:
    """Inside the `with` block the first signal only writes `notice` to stderr, and `noted_signal` gives it; the second interrupts.

    After an exception, which ends the program by itself, signals are still noted. It does nothing where `interrupt_on_signals` has not been
    called.
    """

    def note(number: int, frame: FrameType | None) -> None:
        if not _noted:
            _noted.append((number, time.monotonic()))
            with suppress(OSError):  # the terminal may be gone
                os.write(STREAMS["stderr"], notice.encode())  # without its stream, which may be in the middle of a line
        elif time.monotonic() - _noted[0][1] > SAME_S:
            _interrupt(number, frame)

    handled = [number for number in END_SIGNALS if signal.getsignal(number) is _interrupt]
    for number in handled:
        signal.signal(number, note)
    try:
        yield
    except BaseException:
        notice = ""
        raise
    for number in handled:
        signal.signal(number, _interrupt)


def noted_signal() -> int:
    """The number of the first signal inside `signals_noted`; 0 = none came."""
    return _noted[0][0] if _noted else 0


def ignore_signals() -> None:
    """Leave the signals that end a program to the parent process, which they reach as well."""
    for number in END_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _interrupt(number: int, frame: FrameType | None) -> None:
    ignore_signals()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    raise StopSignal(number)
