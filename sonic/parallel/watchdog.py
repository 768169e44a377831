"""Signs of life: when one rank fails, dies or hangs, all others learn whose fault it is and end within seconds."""

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
from sonic.system.heartbeat import LAST, RESTING, beat

LOOK_S = 0.5  # between two looks at the others
HOLD_S = 5.0  # for an error to arrive that explains a lost connection; for a rank to end by itself before it is ended
NEVER = "never"  # began a process that this system does not show
PACKAGE = str(Path(__file__).parents[1])
MEETINGS = ("/torch/distributed/", "/deepspeed/", f"{PACKAGE}/parallel/channel.py")  # files in which a rank waits for others
THREADS = ("/threading.py", "/queue.py", "/concurrent/futures/")  # files in which a thread waits for another one of its process
BELOW = ("/torch/_ops.py", "/torch/_tensor.py", "/torch/utils/", "/torch/_library/")  # what these call

WORKS, WAITS, IDLES = "works", "waits for ranks", "waits for threads"

log = logging.getLogger("sonic")
numbers = count()  # of the watches of this process, so that each has keys of its own


class Fault(NamedTuple):
    """Whose fault it is that the job ends, and what it is."""

    rank: int
    sentence: str

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.sentence}"


@contextmanager
def watched(rank: int, ranks: int, *, patience_s: float, leave: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Watch over the ranks of the process group while they work; `leave` is done before the last word is said.

    Raises OtherRank instead of an error that another rank is to blame for. MemoryError is one sentence, whose memory it ever was.
    """
    watch = Watch(dist.distributed_c10d._get_default_store(), rank, ranks, patience_s=patience_s) if ranks > 1 else None
    try:
        yield
    except BaseException as error:
        if watch:
            watch.explain(error)
        raise
    finally:
        leave()
        if watch:
            watch.close()


class Watch:
    """A thread beside the work of this rank: it tells the others that this rank lives, and watches the next one.

    All that a rank does is work and must give signs (sonic/system/heartbeat.py), unless it waits for other ranks or is `at_rest`. Messages
    go through a store of keys, which outlives the connections between ranks.
    """

    def __init__(self, store: dist.Store, rank: int, ranks: int, *, patience_s: float) -> None:
        # a connection of its own: who waits on another one locks it
        self.store = dist.PrefixStore(f"watch{next(numbers)}", store.clone())
        self.rank, self.ranks, self.patience_s, self.main = rank, ranks, patience_s, get_ident()
        self.signs = 0
        self.known: Fault | None = None
        self.seen: dict[int, tuple[bytes, float]] = {}  # the last sign of another rank, and when it was new
        self.ended = Event()
        self.store.set(f"place/{rank}", f"{socket.gethostname()} {os.getpid()} {_birth(os.getpid())}")
        LAST.clear()
        beat()
        self.hook = register_module_forward_pre_hook(lambda module, args: beat())
        self.watching = Thread(target=self._watch, name="watch", daemon=True)
        self.watching.start()

    def explain(self, error: BaseException) -> None:
        """Tell all ranks of an error of this one. Raises OtherRank when it is the fault of another, MemoryError when that is it."""
        try:
            fault = self._blame(error)
        except dist.DistNetworkError as lost:
            fault = self.known or _keeper_gone(lost)
            if fault != self.known:
                log.critical("%s", fault)
        if fault.rank != self.rank and not isinstance(error, ValueError | OSError):  # which all ranks may find at once
            raise OtherRank(str(fault)) from error
        if _is_out_of_memory(error):
            raise MemoryError(f"out of memory: {' '.join(str(error).split())}") from error

    def fault(self) -> Fault | None:
        """The first fault that somebody told of, kept: the store may go with the rank that keeps it."""
        if self.known is None and self.store.check(["fault"]):
            self.known = Fault(*json.loads(self.store.get("fault")))
        return self.known

    def close(self) -> None:
        """This rank has done its part. The first one, whose process may keep the store, leaves last."""
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
            log.debug("%s", _keeper_gone(lost))

    def _blame(self, error: BaseException) -> Fault:
        """Whose fault an error of this rank is.

        A lost connection waits for the error that explains it. If none comes, a rank that gives no more signs is to blame.
        """
        if _is_lost_connection(error):
            before, until = self._signs(), time.monotonic() + HOLD_S
            while self.fault() is None and time.monotonic() < until:
                time.sleep(LOOK_S / 2)
            gone = [rank for rank, sign in self._signs().items() if sign == before.get(rank)]
            if gone:
                return self._declare(_gone(gone[0]))
        what = f"{type(error).__name__}: {error}" if isinstance(error, Exception) else "was stopped"
        return self._declare(Fault(self.rank, " ".join(what.split())))

    def _watch(self) -> None:
        while not self.ended.wait(LOOK_S):
            try:
                fault = self._look()
            except dist.DistNetworkError as lost:
                fault = self.known or _keeper_gone(lost)
            mine = fault and fault.rank == self.rank
            if fault and not self.ended.wait(HOLD_S if mine else 2 * HOLD_S):  # ranks that lose this one may still end in order
                if mine or 0 in (self.rank, fault.rank):
                    log.critical("%s", fault)
                os._exit(1)  # the work hangs in a place that no exception reaches

    def _look(self) -> Fault | None:
        """Give a sign, and look at the others."""
        self.signs += 1
        self.store.set(f"sign/{self.rank}", str(self.signs))
        stuck = not RESTING and time.monotonic() - max(LAST.values()) > self.patience_s
        where, waits = self._where() if stuck else ("", False)
        self.store.set(f"waits/{self.rank}", where if waits else "")
        return self.fault() or (self._stuck(where, waits=waits) if stuck else None) or self._neighbour()

    def _stuck(self, where: str, *, waits: bool) -> Fault | None:
        """A rank that waits for others is to blame only when all do."""
        if not waits:
            sentence = f"hangs at {where}: nothing got on for {self.patience_s:g} s (timeout_s)"
            return self._declare(Fault(self.rank, sentence))
        keys = [f"waits/{rank}" for rank in range(self.ranks)]
        places = self.store.multi_get(keys) if self.store.check(keys) else [b""]
        if all(places):
            each = "; ".join(f"rank {rank} at {place.decode()}" for rank, place in enumerate(places))
            return self._declare(Fault(self.rank, f"all ranks wait for each other: {each}"))
        return None

    def _neighbour(self) -> Fault | None:
        """The next rank that is not done: lost when its signs stay the same for too long."""
        for rank in [*range(self.rank + 1, self.ranks), *range(self.rank)]:
            if self.store.check([f"done/{rank}"]):
                continue
            sign, now = self._sign(rank), time.monotonic()
            if self.seen.get(rank, (None,))[0] != sign:
                self.seen[rank] = sign, now
            return self._declare(_gone(rank)) if now - self.seen[rank][1] > self.patience_s else None
        return None

    def _signs(self) -> dict[int, bytes]:
        """The last sign of each other rank that is not done."""
        others = [rank for rank in range(self.ranks) if rank != self.rank]
        return {rank: self._sign(rank) for rank in others if not self.store.check([f"done/{rank}"])}

    def _sign(self, rank: int) -> bytes:
        return self.store.get(f"sign/{rank}") if self.store.check([f"sign/{rank}"]) else b""

    def _declare(self, fault: Fault) -> Fault:
        """Tell of a fault; the first one counts."""
        if before := self.fault():
            return before
        counts = Fault(*json.loads(self.store.compare_set("fault", "", json.dumps(fault))))
        if counts == fault and self.rank != fault.rank:  # which cannot speak for itself
            log.critical("%s", fault)
            _end_frozen(*self.store.get(f"place/{fault.rank}").decode().split())
        return counts

    def _where(self) -> tuple[str, bool]:
        """Where the work is, and whether that is a place in which ranks wait for each other.

        Threads that gave a sign work for this rank; the one that hangs is that which does not wait for the others.
        """
        frames = {thread: frame for thread, frame in sys._current_frames().items() if thread != get_ident()}
        found = {thread: _doing(frame) for thread, frame in frames.items()}
        works = [thread for thread in sorted(LAST, key=LAST.get) if thread in found and found[thread][0] == WORKS]
        waits = [thread for thread in found if found[thread][0] == WAITS]
        return found[[*works, *waits, self.main][0]][1], not works and bool(waits)


def _doing(frame: FrameType) -> tuple[str, str]:
    """Whether a thread works or waits, and where."""
    whole = traceback.extract_stack(frame)
    stack = [each for each in whole if not any(part in each.filename for part in BELOW)] or whole
    ours = [each for each in stack if each.filename.startswith(PACKAGE)][-1:]
    last = stack[-1]
    if any(part in last.filename for part in MEETINGS):
        return WAITS, _named((ours or [last])[0])
    kind = IDLES if any(part in last.filename for part in THREADS) else WORKS
    return kind, ", called by ".join(dict.fromkeys(_named(each) for each in (last, *ours)))


def _named(frame: traceback.FrameSummary) -> str:
    return f"{os.path.basename(frame.filename)}:{frame.lineno} {frame.name}"


def _is_out_of_memory(error: BaseException) -> bool:
    """Of a device or of the host; the latter is a plain RuntimeError in torch."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _is_lost_connection(error: BaseException) -> bool:
    """Whether an error comes from where ranks wait for each other."""
    if not isinstance(error, RuntimeError) or _is_out_of_memory(error):
        return False
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not any(part in frame.filename for part in BELOW)]
    return bool(frames) and any(part in frames[-1].filename for part in MEETINGS)


def _gone(rank: int) -> Fault:
    return Fault(rank, "gives no more signs of life: it was killed (by the system when memory ran out?), or its machine is gone")


def _end_frozen(host: str, pid: str, birth: str) -> None:
    """End a process of this machine that still exists but gives no signs: nobody else may use its device before."""
    if host == socket.gethostname() and birth == _birth(int(pid)) != NEVER:
        log.critical("process %s is still there and is ended", pid)
        os.kill(int(pid), signal.SIGKILL)


def _birth(pid: int) -> str:
    """When a process began, in ticks since the machine did; tells it from a later one of the same number."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.read_text().rpartition(")")[2].split()[19] if stat.exists() else NEVER


def _keeper_gone(lost: dist.DistNetworkError) -> Fault:
    return Fault(0, f"is gone, and with it the store that brought the ranks together ({' '.join(str(lost).split())})")
