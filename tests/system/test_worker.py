"""The worker process: results, errors, and calls that kill it."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from sonic.system.worker import Crashed, Worker


class Strange(Exception):
    """An error that cannot be restored from its message."""

    def __init__(self, one: int, other: int) -> None:
        super().__init__("strange")


def refuse(word: str) -> None:
    raise ValueError(word)


def be_strange() -> None:
    raise Strange(1, 2)


@pytest.fixture
def worker():
    found = Worker(os.getpid)
    yield found
    found.close()


def test_calls_share_a_process_that_is_not_this_one(worker):
    first, again = worker.call(os.getpid), worker.call(os.getpid)
    assert first == again != os.getpid()


def test_errors_come_back_and_the_next_call_is_answered(worker):
    with pytest.raises(ValueError, match=r"^a sentence") as found:
        worker.call(refuse, "a sentence")
    assert str(found.value) == "a sentence" and "in refuse" in found.value.__notes__[0]
    with pytest.raises(RuntimeError, match="Strange: strange"):
        worker.call(be_strange)
    assert worker.call(abs, -3) == 3


@pytest.mark.parametrize(("end", "given"), [((os._exit, 3), "exit code 3"), ((signal.raise_signal, signal.SIGSEGV), "SIGSEGV")])
def test_a_crash_fails_only_its_own_call(worker, end, given):
    before = worker.call(os.getpid)
    with pytest.raises(Crashed, match=given):
        worker.call(*end)
    assert worker.call(os.getpid) != before


def test_a_process_that_dies_between_calls_is_replaced(worker):
    os.kill(worker.call(os.getpid), signal.SIGKILL)
    time.sleep(0.3)
    assert worker.call(abs, -3) == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_is_stopped_has_not_crashed(worker, number):
    with pytest.raises(KeyboardInterrupt):
        worker.call(signal.raise_signal, number)


def test_a_waiting_caller_learns_that_the_worker_was_stopped(worker):
    worker.call(abs, 1)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(worker.call, time.sleep, 60)
        time.sleep(0.3)
        worker.stop()
        assert isinstance(waiting.exception(timeout=10), KeyboardInterrupt)
