"""The watchdog: when one rank fails, dies or hangs, all ranks learn which one it was and end within seconds."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from threading import Event, Thread, get_ident
from types import FrameType
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.modules.module import register_module_forward_pre_hook

from sonic.config import OtherRank
from sonic.system.heartbeat import LAST_HEARTBEAT, PAUSED, heartbeat

LOOK_S = 0.5  # seconds between two checks of the other ranks
HOLD_S = 5.0  # seconds to wait for an error that explains a lost connection, and for a rank to end before it is killed
NEVER = "never"  # start time of a process when this system does not tell it
PACKAGE = str(Path(__file__).parents[1])
COLLECTIVE_FILES = ("/torch/distributed/", "/deepspeed/", f"{PACKAGE}/parallel/channel.py")  # files in which a rank waits for others
THREADS = ("/threading.py", "/queue.py", "/concurrent/futures/")  # files in which a thread waits for another one of its process
BELOW = ("/torch/_ops.py", "/torch/_tensor.py", "/torch/utils/", "/torch/_library/")  # files of functions that these call

WORKS, WAITS, IDLES = "works", "waits for ranks", "waits for threads"

log = logging.getLogger("sonic")
counter = count()  # of this process's watchdogs, so that each has its own keys


class Fault(NamedTuple):
    """The rank that caused the end of the job, and what happened to it."""

    rank: int
    sentence: str

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.sentence}"


@contextmanager
def watch_ranks(rank: int, ranks: int, *, patience_s: float, leave: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Watch the ranks of the process group inside the `with` block; `leave` is called before the watchdog is closed.

    Raises OtherRank in place of an error that another rank caused, and MemoryError with one sentence when a device or the host is out
    of memory.
    """
    watchdog = Watchdog(dist.distributed_c10d._get_default_store(), rank, ranks, patience_s=patience_s) if ranks > 1 else None
    try:
        yield
    except BaseException as error:
        if watchdog:
            watchdog.explain(error)
        raise
    finally:
        leave()
        if watchdog:
            watchdog.close()


class Watchdog:
    """A thread of each rank that signals to the others that its process runs, and watches the next rank.

    A rank that works must give heartbeats (sonic/system/heartbeat.py), except while it waits for other ranks or in `pause_watchdog`.
    Signals go through a key-value store, which still works when connections between ranks are lost.
    """

    def __init__(self, store: dist.Store, rank: int, ranks: int, *, patience_s: float) -> None:
        # a separate connection, because a waiting call locks its connection
        self.store = dist.PrefixStore(f"watch{next(counter)}", store.clone())
        self.rank, self.ranks, self.patience_s, self.main = rank, ranks, patience_s, get_ident()
        self.heartbeats = 0
        self.known: Fault | None = None
        self.seen: dict[int, tuple[bytes, float]] = {}  # the last signal of each rank, and when it changed
        self.ended = Event()
        self.store.set(f"place/{rank}", f"{socket.gethostname()} {os.getpid()} {_birth(os.getpid())}")
        LAST_HEARTBEAT.clear()
        heartbeat()
        self.hook = register_module_forward_pre_hook(lambda module, args: heartbeat())
        self.watching = Thread(target=self._watch, name="watch", daemon=True)
        self.watching.start()

    def explain(self, error: BaseException) -> None:
        """Report an error of this rank to all ranks. Raises OtherRank when another rank caused it, MemoryError when memory ran out."""
        try:
            fault = self._blame(error)
        except dist.DistNetworkError as lost:
            fault = self.known or _store_lost(lost)
            if fault != self.known:
                log.critical("%s", fault)
        if fault.rank != self.rank and not isinstance(error, ValueError | OSError):  # all ranks may raise these at the same time
            raise OtherRank(str(fault)) from error
        if _is_out_of_memory(error):
            raise MemoryError(f"out of memory: {' '.join(str(error).split())}") from error

    def fault(self) -> Fault | None:
        """The first fault that any rank reported; it is remembered, because the store ends with the rank that hosts it."""
        if self.known is None and self.store.check(["fault"]):
            self.known = Fault(*json.loads(self.store.get("fault")))
        return self.known

    def close(self) -> None:
        """Stop watching and mark this rank as done. The first rank, whose process may host the store, waits for the others."""
        self.ended.set()
        self.watching.join()
        self.hook.remove()
        try:
            self.store.set(f"done/{self.rank}", "1")
            until = time.monotonic() + HOLD_S
            everybody = [f"done/{rank}" for rank in range(self.ranks)]
            while self.rank == 0 and not self.store.check(everybody) and time.monotonic() < until:
                time.sleep(LOOK_S / 5)
        except dist.DistNetworkError as lost:
            log.debug("%s", _store_lost(lost))

    def _blame(self, error: BaseException) -> Fault:
        """The fault behind an error of this rank.

        For a lost connection it waits for another rank's error that explains it, then for a rank whose signals have stopped.
        """
        if _is_lost_connection(error):
            before, until = self._heartbeats(), time.monotonic() + HOLD_S
            while self.fault() is None and time.monotonic() < until:
                time.sleep(LOOK_S / 2)
            gone = [rank for rank, heartbeat_seen in self._heartbeats().items() if heartbeat_seen == before.get(rank)]
            if gone:
                return self._declare(_gone(gone[0]))
        what = f"{type(error).__name__}: {error}" if isinstance(error, Exception) else "was stopped"
        return self._declare(Fault(self.rank, " ".join(what.split())))

    def _watch(self) -> None:
        while not self.ended.wait(LOOK_S):
            try:
                fault = self._look()
            except dist.DistNetworkError as lost:
                fault = self.known or _store_lost(lost)
            mine = fault and fault.rank == self.rank
            if fault and not self.ended.wait(HOLD_S if mine else 2 * HOLD_S):  # ranks that lose this one may still exit normally
                if mine or 0 in (self.rank, fault.rank):
                    log.critical("%s", fault)
                os._exit(1)  # the main thread hangs where no exception can reach it

    def _look(self) -> Fault | None:
        """Signal that this process runs. Gives a fault when any rank has failed or hangs."""
        self.heartbeats += 1
        self.store.set(f"sign/{self.rank}", str(self.heartbeats))
        stuck = not PAUSED and time.monotonic() - max(LAST_HEARTBEAT.values()) > self.patience_s
        where, waits = self._where() if stuck else ("", False)
        self.store.set(f"waits/{self.rank}", where if waits else "")
        return self.fault() or (self._stuck(where, waits=waits) if stuck else None) or self._check_next_rank()

    def _stuck(self, where: str, *, waits: bool) -> Fault | None:
        """The fault of this rank, which has given no heartbeat for too long; when it waits for other ranks, only if all ranks wait."""
        if not waits:
            sentence = f"hangs at {where}: nothing got on for {self.patience_s:g} s (timeout_s)"
            return self._declare(Fault(self.rank, sentence))
        keys = [f"waits/{rank}" for rank in range(self.ranks)]
        positions = self.store.multi_get(keys) if self.store.check(keys) else [b""]
        if all(positions):
            each = "; ".join(f"rank {rank} at {position.decode()}" for rank, position in enumerate(positions))
            return self._declare(Fault(self.rank, f"all ranks wait for each other: {each}"))
        return None

    def _check_next_rank(self) -> Fault | None:
        """The fault of the next rank that is not done, when its signal has not changed for too long."""
        for rank in [*range(self.rank + 1, self.ranks), *range(self.rank)]:
            if self.store.check([f"done/{rank}"]):
                continue
            last, now = self._heartbeat(rank), time.monotonic()
            if self.seen.get(rank, (None,))[0] != last:
                self.seen[rank] = last, now
            return self._declare(_gone(rank)) if now - self.seen[rank][1] > self.patience_s else None
        return None

    def _heartbeats(self) -> dict[int, bytes]:
        """The last signal of each other rank that is not done."""
        others = [rank for rank in range(self.ranks) if rank != self.rank]
        return {rank: self._heartbeat(rank) for rank in others if not self.store.check([f"done/{rank}"])}

    def _heartbeat(self, rank: int) -> bytes:
        return self.store.get(f"sign/{rank}") if self.store.check([f"sign/{rank}"]) else b""

    def _declare(self, fault: Fault) -> Fault:
        """Report a fault to all ranks. Gives the first fault that any rank reported."""
        if before := self.fault():
            return before
        counts = Fault(*json.loads(self.store.compare_set("fault", "", json.dumps(fault))))
        if counts == fault and self.rank != fault.rank:  # a rank that cannot report its own fault
            log.critical("%s", fault)
            _end_frozen(*self.store.get(f"place/{fault.rank}").decode().split())
        return counts

    def _where(self) -> tuple[str, bool]:
        """The line of code that this rank executes, and whether it waits there for other ranks.

        Among the threads that gave heartbeats, it is the one that does not wait for other ranks or threads.
        """
        frames = {thread: frame for thread, frame in sys._current_frames().items() if thread != get_ident()}
        found = {thread: _doing(frame) for thread, frame in frames.items()}
        works = [thread for thread in sorted(LAST_HEARTBEAT, key=LAST_HEARTBEAT.get) if thread in found and found[thread][0] == WORKS]
        waits = [thread for thread in found if found[thread][0] == WAITS]
        return found[[*works, *waits, self.main][0]][1], not works and bool(waits)


def _doing(frame: FrameType) -> tuple[str, str]:
    """Whether a thread works, waits for ranks or waits for threads, and the line of code where."""
    whole = traceback.extract_stack(frame)
    stack = [each for each in whole if not any(part in each.filename for part in BELOW)] or whole
    ours = [each for each in stack if each.filename.startswith(PACKAGE)][-1:]
    last = stack[-1]
    if any(part in last.filename for part in COLLECTIVE_FILES):
        return WAITS, _named((ours or [last])[0])
    kind = IDLES if any(part in last.filename for part in THREADS) else WORKS
    return kind, ", called by ".join(dict.fromkeys(_named(each) for each in (last, *ours)))


def _named(frame: traceback.FrameSummary) -> str:
    return f"{os.path.basename(frame.filename)}:{frame.lineno} {frame.name}"


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host is out of memory; for the host torch raises a plain RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _is_lost_connection(error: BaseException) -> bool:
    """Whether an error was raised by code that waits for other ranks."""
    if not isinstance(error, RuntimeError) or _is_out_of_memory(error):
        return False
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not any(part in frame.filename for part in BELOW)]
    return bool(frames) and any(part in frames[-1].filename for part in COLLECTIVE_FILES)


def _gone(rank: int) -> Fault:
    return Fault(rank, "gives no more signs of life: it was killed (by the system when memory ran out?), or its machine is gone")


def _end_frozen(host: str, pid: str, birth: str) -> None:
    """End a process of this machine that still exists but gives no more signals, because it still occupies its device."""
    if host == socket.gethostname() and birth == _birth(int(pid)) != NEVER:
        log.critical("process %s is still there and is ended", pid)
        os.kill(int(pid), signal.SIGKILL)


def _birth(pid: int) -> str:
    """Start time of a process in clock ticks since boot, which distinguishes it from a later process with the same number."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.read_text().rpartition(")")[2].split()[19] if stat.exists() else NEVER


def _store_lost(lost: dist.DistNetworkError) -> Fault:
    return Fault(0, f"is gone, and with it the store that brought the ranks together ({' '.join(str(lost).split())})")
