"""Stages of work that hang once each, until the watch finds it: in one process and in no time."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import wraps

import torch.distributed as dist

from sonic.parallel.watchdog import Watchdog
from sonic.system.heartbeat import heartbeat

PATIENCE_S = 0.4
SENTENCE = rf"rank 0: hangs at hanging.py:\d+ hangs, called by \w+.py:\d+ \S+: nothing got on for {PATIENCE_S} s"


def looking(watchdog: Watchdog, found: list) -> threading.Thread:
    """Looks of ours until somebody is at fault."""

    def look() -> None:
        until = time.monotonic() + 20 * watchdog.patience_s
        while (fault := watchdog._look()) is None and time.monotonic() < until:
            time.sleep(0.02)
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
def every_stage_hangs(stages: Sequence[tuple[object, str]], monkeypatch) -> Iterator[None]:
    """Every stage (an object and the name of its function) hangs once, until that is found and named in one sentence."""
    store, faults = dist.HashStore(), []
    watchdog = unwatched(store, 0, PATIENCE_S)
    watchdog.store.set("done/1", "1")

    def hanging(method):
        struck = []

        @wraps(method)
        def hangs(*arguments, **named):
            if not struck:
                struck.append(1)
                heartbeat()
                looks = looking(watchdog, faults)
                while looks.is_alive():
                    time.sleep(0.01)
                watchdog.store.delete_key("fault")
            return method(*arguments, **named)

        return hangs

    for owner, name in stages:
        monkeypatch.setattr(owner, name, hanging(getattr(owner, name)))
    yield
    watchdog.close()
    assert len(faults) == len(stages), faults
    assert all(re.match(SENTENCE, each) for each in faults), faults
