"""What a process has to do with its terminal: streams that outlast whoever reads them, and the signals that end it."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys

STREAMS = {"stdin": 0, "stdout": 1, "stderr": 2}
ENDINGS = signal.SIGTERM, signal.SIGHUP  # told to end; the terminal was closed


class Outlasting(io.FileIO):
    """A stream's file: once it cannot be written to, what follows goes nowhere and nobody is disturbed.

    `failure` is why, unless it is that the reader of a pipe has seen enough.
    """

    failure: OSError | None = None
    named = "stdout"

    def write(self, data) -> int:
        """Write, or drop."""
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # a pipe that was closed, a terminal that is gone
                self.failure = OSError(error.errno, error.strerror, self.named)
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return memoryview(data).nbytes


def outlast_readers() -> None:
    """Let stdout and stderr outlast their readers, a full disk, and having been closed from the start (`>&-`).

    Numbers 0 to 2 that are free would be given to the next files that are opened, and what libraries say would end in those.
    """
    for name, number in STREAMS.items():
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
        stream = getattr(sys, name)
        if name != "stdin":
            setattr(sys, name, _outlasting(number, stream) if stream is not None else os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))


def _outlasting(number: int, stream: io.TextIOWrapper) -> io.TextIOWrapper:
    stream.flush()
    file = io.BufferedWriter(Outlasting(number, "w", closefd=False))
    return io.TextIOWrapper(file, stream.encoding, stream.errors, line_buffering=stream.line_buffering)


def failure_of_stdout() -> OSError | None:
    """Why stdout has been lost, None when all that was said went out, or its reader had seen enough."""
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw.failure if isinstance(raw, Outlasting) else None


def end_as_with_ctrl_c() -> None:
    """Let the signals that end a program raise KeyboardInterrupt, so that what is half-written goes first; those that are ignored,
    as SIGHUP is under nohup, stay so. Once one has come, others do not disturb the clearing up."""
    for number in ENDINGS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)


def _interrupt(number: int, frame: object) -> None:
    for ending in ENDINGS:
        signal.signal(ending, signal.SIG_IGN)
    raise KeyboardInterrupt
