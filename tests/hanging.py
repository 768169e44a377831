"""Stages of work that hang once each, until the watch finds it: in one process and in no time."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import wraps

import torch.distributed as dist

from sonic.parallel.watchdog import Watch
from sonic.system.heartbeat import beat

PATIENCE_S = 0.4
SENTENCE = rf"rank 0: hangs at hanging.py:\d+ hangs, called by \w+.py:\d+ \S+: nothing got on for {PATIENCE_S} s"


def looking(watched: Watch, found: list) -> threading.Thread:
    """Looks of ours until somebody is at fault."""

    def look() -> None:
        until = time.monotonic() + 20 * watched.patience_s
        while (fault := watched._look()) is None and time.monotonic() < until:
            time.sleep(0.02)
        found.append(str(fault))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    return thread


def unwatched(store: dist.Store, rank: int, patience_s: float) -> Watch:
    """One of two that watch each other, whose looks are ours."""
    watched = Watch(store, rank, 2, patience_s=patience_s)
    watched.ended.set()
    watched.watching.join()
    return watched


@contextmanager
def every_stage_hangs(stages: Sequence[tuple[object, str]], monkeypatch) -> Iterator[None]:
    """Every stage (an object and the name of its function) hangs once, until that is found and named in one sentence."""
    store, said = dist.HashStore(), []
    watched = unwatched(store, 0, PATIENCE_S)
    watched.store.set("done/1", "1")

    def hanging(method):
        struck = []

        @wraps(method)
        def hangs(*arguments, **named):
            if not struck:
                struck.append(1)
                beat()
                looks = looking(watched, said)
                while looks.is_alive():
                    time.sleep(0.01)
                watched.store.delete_key("fault")
            return method(*arguments, **named)

        return hangs

    for owner, name in stages:
        monkeypatch.setattr(owner, name, hanging(getattr(owner, name)))
    yield
    watched.close()
    assert len(said) == len(stages), said
    assert all(re.match(SENTENCE, each) for each in said), said
