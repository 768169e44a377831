"""Heartbeats of this process: the work gives them wherever it is, and the watchdog reads them.

While a watchdog runs (sonic/parallel/watchdog.py) every call of a torch module gives one; other work that may take long calls `heartbeat`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident

LAST_HEARTBEAT: dict[int, float] = {}  # by thread: time.monotonic() of its last sign
PAUSED: set[int] = set()  # threads in at_rest


def heartbeat() -> None:
    """This thread gets on."""
    LAST_HEARTBEAT[get_ident()] = time.monotonic()


@contextmanager
def pause_watchdog() -> Iterator[None]:
    """Inside, this thread waits for something that may take as long as it likes."""
    PAUSED.add(get_ident())
    try:
        yield
    finally:
        PAUSED.discard(get_ident())
        heartbeat()
