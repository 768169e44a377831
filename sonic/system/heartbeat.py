"""Signs that the work of this process gets on: work gives them wherever it is, and who watches the process reads them.

Modules of torch give a sign with every call while somebody watches (sonic/parallel/watchdog.py); what else may take long calls `beat`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident

LAST: dict[int, float] = {}  # by thread: time.monotonic() of its last sign
RESTING: set[int] = set()  # threads in at_rest


def beat() -> None:
    """This thread gets on."""
    LAST[get_ident()] = time.monotonic()


@contextmanager
def at_rest() -> Iterator[None]:
    """Inside, this thread waits for something that may take as long as it likes."""
    RESTING.add(get_ident())
    try:
        yield
    finally:
        RESTING.discard(get_ident())
        beat()
