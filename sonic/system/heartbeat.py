"""What the threads of this process tell the watchdog (sonic/parallel/watchdog.py): that they progress, or why they may not.

While a watchdog runs, every call of a torch module is a heartbeat; other work that may take long calls `heartbeat`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident


class Activity:
    """The heartbeats of this process and the time of the last, and its threads inside `pause_watchdog` and `waiting_for_others`."""

    def __init__(self) -> None:
        self.heartbeats, self.last = 0, 0.0
        self.paused: list[int] = []
        self.waiting: list[int] = []


ACTIVITY = Activity()


def heartbeat() -> None:
    """Record that this process makes progress."""
    ACTIVITY.heartbeats += 1
    ACTIVITY.last = time.time()


@contextmanager
def pause_watchdog() -> Iterator[None]:
    """Inside the `with` block nothing counts as a hang, because this thread does something that may take any time."""
    with _listed_in(ACTIVITY.paused):
        yield


@contextmanager
def waiting_for_others() -> Iterator[None]:
    """Inside the `with` block this thread waits for another rank or thread, so a hang is not its fault."""
    with _listed_in(ACTIVITY.waiting):
        yield


@contextmanager
def _listed_in(threads: list[int]) -> Iterator[None]:
    threads.append(get_ident())
    try:
        yield
    finally:
        threads.remove(get_ident())
