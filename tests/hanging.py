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
from sonic.system.heartbeat import ACTIVITY

PATIENCE_S = 0.05
LONG_S = 10.0  # for one hang to be found on a busy machine
LIBRARY = str(Path(watchdog_module.__file__).parents[1])
WATCHERS = {watchdog_module.__file__, heartbeat_module.__file__}


def looking(watchdog: Watchdog, found: list, long_s: float = LONG_S) -> threading.Thread:
    """A thread that looks until there is a fault; a watchdog's own thread would end this process then."""

    def look() -> None:
        until = time.monotonic() + long_s
        while (fault := watchdog.look()) is None and time.monotonic() < until:
            time.sleep(0.005)
        found.append(str(fault))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    return thread


@contextmanager
def every_file_hangs() -> Iterator[dict[str, str]]:
    """The first call in every file of the library hangs, in whatever thread, until that is found. Gives what was found, by file.

    Where the work may take as long as it likes (`pause_watchdog`) nothing hangs.
    """
    found: dict[str, str] = {}
    store, one_at_a_time = dist.HashStore(), threading.Lock()
    watchdog_module.LOOK_S = 0.005

    def hangs(frame: FrameType, event: str, argument: object) -> None:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        ours = event == "call" and file.startswith(LIBRARY) and file not in WATCHERS and name != "<module>"
        if not ours or ACTIVITY.paused or file in found or not one_at_a_time.acquire(blocking=False):
            return
        faults, until = [""], time.monotonic() + LONG_S
        while not says_so(file, faults[-1]) and time.monotonic() < until:  # a thread that is slow now may be blamed first
            watchdog = Watchdog(store, 0, [0], patience_s=PATIENCE_S)
            looks = looking(watchdog, faults)
            while looks.is_alive():
                time.sleep(0.005)
            watchdog.close()
        found[file] = faults[-1]
        one_at_a_time.release()

    threading.setprofile(hangs)
    sys.setprofile(hangs)
    try:
        yield found
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    wrong = {Path(file).name: each for file, each in found.items() if not says_so(file, each)}
    assert not wrong, wrong


def says_so(file: str, fault: str) -> bool:
    """Whether a fault is that this process hangs in a file."""
    line = rf"hanging.py:\d+ hangs, called by {re.escape(Path(file).name)}:\d+ \S+"
    return re.match(rf"rank 0: hangs at (.* and )?{line}(;| and .*|: )", fault) is not None and "nothing got on for" in fault
