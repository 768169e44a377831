"""A process beside this one that calls functions one at a time, so that a crash in native code costs one call and no more.
Standard library only."""

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

GRACE_S = 5.0  # seconds in which a process that is stopped may remove what it has half-written
_INTERRUPTED = 130
_STOPPED = (_INTERRUPTED, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP)  # exit codes of a process that somebody stopped


class Crashed(RuntimeError):
    """The process died during a call."""


class Worker:
    """Calls functions in a spawned process, which begins with the first call and anew after a crash. `prepare()` comes first in it.

    The process ends with this one, however that ends.
    """

    def __init__(self, prepare: Callable[[], object] = int) -> None:
        self.prepare, self.stopped = prepare, False
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None

    def call(self, function: Callable, *arguments: Any) -> Any:
        """What function(*arguments) returns or raises there. Raises Crashed when the process dies of it, KeyboardInterrupt when
        somebody stopped it."""
        if self._process is not None and not self._process.is_alive():
            self.close()  # it died between two calls, of neither
        if self._process is None:
            self._begin()
        try:
            self._pipe.send((function, arguments))
            done, answer = self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            code = self._ended()
            if code in _STOPPED or self.stopped:
                raise KeyboardInterrupt from None
            raise Crashed(_cause(code)) from None
        except BaseException:
            self.close()  # the answer would be taken for that of the next call
            raise
        if not done:
            raise answer
        return answer

    def stop(self) -> None:
        """End the process from another thread than the one that waits for it, which then sees KeyboardInterrupt."""
        self.stopped = True
        process = self._process
        if process is not None and process.is_alive():
            process.terminate()
            if not wait([process.sentinel], GRACE_S):
                process.kill()

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.terminate()
            if not wait([self._process.sentinel], GRACE_S):
                self._process.kill()
            self._ended()

    def _begin(self) -> None:
        if self.stopped:
            raise KeyboardInterrupt
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self.prepare), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self._pipe.recv()
        except EOFError:
            code = self._ended()
            if code in _STOPPED or self.stopped:
                raise KeyboardInterrupt from None
            raise RuntimeError(f"a worker process could not begin ({_cause(code)})") from None

    def _ended(self) -> int | None:
        """Forget the process and its pipe. Gives its exit code."""
        process, pipe = self._process, self._pipe
        self._process = self._pipe = None
        pipe.close()
        process.join()
        return process.exitcode


def _serve(pipe: Connection, prepare: Callable[[], object]) -> None:
    """Answer calls until nobody asks any more."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what is half-written goes first
    above = multiprocessing.parent_process()
    threading.Thread(target=lambda: (above.join(), os._exit(1)), daemon=True).start()
    try:
        prepare()
        pipe.send(None)
        while True:
            function, arguments = pipe.recv()
            pipe.send_bytes(_answer(function, arguments))
    except (EOFError, BrokenPipeError):
        log.debug("nobody asks any more")
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)


def _answer(function: Callable, arguments: tuple) -> bytes:
    """Whether it returned, and what it returned or raised; an error brings along where it happened."""
    try:
        return pickle.dumps((True, function(*arguments)), pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        trace = traceback.format_exc()
        try:
            error.add_note(trace)
            answer = pickle.dumps((False, error))
            pickle.loads(answer)  # an error whose __init__ wants more than its message cannot be restored
            return answer
        except Exception:
            return pickle.dumps((False, RuntimeError(trace)))


def _cause(code: int | None) -> str:
    """What a process died of."""
    if code is not None and code < 0:
        try:
            return signal.Signals(-code).name
        except ValueError:
            return f"signal {-code}"
    return f"exit code {code}"
