"""A worker process that calls functions one at a time, so that a crash in native code fails a single call. Standard library only."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

log = logging.getLogger(__name__)

GRACE_S = 5.0  # seconds that a stopped process has to remove its incomplete files
_INTERRUPTED = 130
_STOPPED = (_INTERRUPTED, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP, -signal.SIGUSR1)  # exit codes after a signal to stop


class Crashed(RuntimeError):
    """The process died during a call."""


class Worker:
    """Calls functions in a spawned process, which starts at the first call, and again after a crash, by running `prepare()`.

    It ends when this process ends, in whatever way.
    """

    def __init__(self, prepare: Callable[[], object]) -> None:
        self.prepare, self.stopped = prepare, False
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None

    def call(self, function: Callable, *arguments: Any) -> Any:
        """Run function(*arguments) in the process, and return or raise what it does. Raises Crashed when the process dies during the call,
        KeyboardInterrupt when it was stopped."""
        if self._process is not None and not self._process.is_alive():
            self.close()  # it died between two calls
        if self._process is None:
            self._begin()
        return self._ask(function, arguments)

    def stop(self) -> None:
        """End the process from another thread; the thread that waits in `call` gets KeyboardInterrupt."""
        self.stopped = True
        _end(self._process)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            _end(self._process)
            self._ended()

    def _begin(self) -> None:
        if self.stopped:
            raise KeyboardInterrupt
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self._ask(self.prepare, ())
        except Exception as error:
            self.close()
            raise RuntimeError(f"a worker process could not begin ({error})") from error

    def _ask(self, function: Callable, arguments: tuple) -> Any:
        try:
            self._pipe.send((function, arguments))
            done, answer = self._pipe.recv()
        except (EOFError, ConnectionError):
            code = self._ended()
            if code in _STOPPED or self.stopped:
                raise KeyboardInterrupt from None
            raise Crashed(signal.Signals(-code).name if code < 0 else f"exit code {code}") from None
        except BaseException:
            self.close()  # otherwise the next call would receive the answer of this one
            raise
        if not done:
            raise answer
        return answer

    def _ended(self) -> int:
        """Close the pipe and wait for the process to end. Gives its exit code."""
        process, pipe = self._process, self._pipe
        self._process = self._pipe = None
        pipe.close()
        process.join()
        return process.exitcode


def _end(process: multiprocessing.process.BaseProcess | None) -> None:
    """End a process, after some time by force. This does not `join` it, which only one thread may do at a time."""
    if process is not None and process.is_alive():
        process.terminate()
        if not wait([process.sentinel], GRACE_S):
            process.kill()


def _serve(pipe: Connection) -> None:
    """Answer calls until the pipe is closed; the process also ends when its parent does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, so that incomplete files are removed
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    try:
        while True:
            function, arguments = pipe.recv()
            pipe.send_bytes(_answer(function, arguments))
    except (EOFError, BrokenPipeError):
        log.debug("the pipe to the main process is closed")
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)


def _answer(function: Callable, arguments: tuple) -> bytes:
    """The pickled answer to a call: whether it returned, and its value or its error with the traceback as a note."""
    try:
        return pickle.dumps((True, function(*arguments)), pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        trace = traceback.format_exc()
        try:
            error.add_note(trace)
            answer = pickle.dumps((False, error))
            pickle.loads(answer)  # fails for an error whose __init__ needs more than its message
            return answer
        except Exception:
            return pickle.dumps((False, RuntimeError(trace)))
