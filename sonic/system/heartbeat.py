"""Heartbeats of the threads of this process, which the watchdog reads (sonic/parallel/watchdog.py).

While a watchdog runs, every call of a torch module gives one; other work that may take long calls `heartbeat`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident

LAST_HEARTBEAT: dict[int, float] = {}  # by thread: time.monotonic() of its last heartbeat
PAUSED: set[int] = set()  # threads inside `pause_watchdog`


def heartbeat() -> None:
    """Record that this thread makes progress."""
    LAST_HEARTBEAT[get_ident()] = time.monotonic()


@contextmanager
def pause_watchdog() -> Iterator[None]:
    """Inside the `with` block this thread needs no heartbeats, because it waits for something that may take any time."""
    PAUSED.add(get_ident())
    try:
        yield
    finally:
        PAUSED.discard(get_ident())
        heartbeat()
