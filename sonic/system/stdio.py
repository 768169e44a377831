"""The process and its terminal: output streams that survive the loss of their reader, and the signals that end the process."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys

STREAMS = {"stdin": 0, "stdout": 1, "stderr": 2}
END_SIGNALS = signal.SIGTERM, signal.SIGHUP  # a request to end; a closed terminal


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


def interrupt_on_signals() -> None:
    """Make the signals that end a program raise KeyboardInterrupt, so that incomplete files are removed.

    Signals that are ignored, such as SIGHUP under nohup, stay ignored. After the first signal all of them are ignored, so that they do
    not interrupt the cleanup.
    """
    for number in END_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)


def _interrupt(number: int, frame: object) -> None:
    for each in END_SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt
