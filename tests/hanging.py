"""Work that hangs once in every file of the library that it comes through, until the watchdog finds it: in one process and in no time."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from sonic.parallel import watchdog as watchdog_module
from sonic.parallel.watchdog import Watchdog
from sonic.system import heartbeat as heartbeat_module
from sonic.system.heartbeat import PAUSED, heartbeat

PATIENCE_S = 0.05
LONG_S = 10.0  # for one hang to be found on a busy machine
LIBRARY = str(Path(watchdog_module.__file__).parents[1])
WATCHERS = {watchdog_module.__file__, heartbeat_module.__file__}


def looking(watchdog: Watchdog, found: list) -> threading.Thread:
    """Looks of ours until somebody is at fault."""

    def look() -> None:
        until = time.monotonic() + max(5.0, 20 * watchdog.patience_s)
        while (fault := watchdog._look()) is None and time.monotonic() < until:
            time.sleep(0.005)
        found.append(str(fault))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    return thread


def unwatched(store: dist.Store, rank: int, patience_s: float) -> Watchdog:
    """One of two that watch each other, whose looks are ours."""
    watchdog = Watchdog(store, rank, 2, patience_s=patience_s)
    watchdog.ended.set()
    watchdog.watching.join()
    return watchdog


@contextmanager
def every_file_hangs() -> Iterator[dict[str, str]]:
    """The first call in every file of the library hangs, in whatever thread, until that is found. Gives what was found, by file.

    Where the work may take as long as it likes (`pause_watchdog`) nothing hangs.
    """
    found: dict[str, str] = {}
    watchdog = unwatched(dist.HashStore(), 0, PATIENCE_S)
    watchdog.store.set("done/1", "1")
    one_at_a_time = threading.Lock()

    def hangs(frame: FrameType, event: str, argument: object) -> None:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        ours = event == "call" and file.startswith(LIBRARY) and file not in WATCHERS and name != "<module>"
        if not ours or PAUSED or file in found or not one_at_a_time.acquire(blocking=False):
            return
        faults, until = [""], time.monotonic() + LONG_S
        heartbeat()
        while not re.match(sentence_of(file), faults[-1]) and time.monotonic() < until:  # a thread that is slow now may be blamed first
            looks = looking(watchdog, faults)
            while looks.is_alive():
                time.sleep(0.005)
            watchdog.store.delete_key("fault")
            watchdog.known = None
        found[file] = faults[-1]
        one_at_a_time.release()

    threading.setprofile(hangs)
    sys.setprofile(hangs)
    try:
        yield found
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
        watchdog.close()
    wrong = {Path(file).name: each for file, each in found.items() if not re.match(sentence_of(file), each)}
    assert not wrong, wrong


def sentence_of(file: str) -> str:
    """What is said of a hang in a file, as a pattern."""
    return rf"rank 0: hangs at hanging.py:\d+ hangs, called by {re.escape(Path(file).name)}:\d+ \S+: nothing got on for {PATIENCE_S} s"
