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
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from threading import Event, Thread, get_ident
from typing import NamedTuple

import torch
import torch.distributed as dist

from sonic.config import OtherRank
from sonic.model.dit import ENTRIES, AvatarDiT

LOOK_S = 0.5  # between two looks at the others
HOLD_S = 5.0  # for an error to arrive that explains a lost connection; for a rank to end by itself before it is ended
NEVER = "never"  # began a process that this system does not show
PACKAGE = str(Path(__file__).parents[1])
MEETINGS = ("/torch/distributed/", "/deepspeed/", f"{PACKAGE}/parallel/pipeline.py")  # files in which a rank waits for others
BELOW = ("/torch/_ops.py", "/torch/_tensor.py", "/torch/utils/", "/torch/_library/")  # what these call

log = logging.getLogger("sonic")


class Fault(NamedTuple):
    """Whose fault it is that the job ends, and what it is."""

    rank: int
    sentence: str

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.sentence}"


class Watch:
    """A thread beside the work of this rank: it tells the others that this rank lives, and watches the next one.

    A rank is at work inside `at_work` and shows by `beat` that it gets on; between two pieces of work it may rest for as long as it
    likes. All is said through a store of keys, which outlives the connections between ranks.
    """

    def __init__(self, store: dist.Store, rank: int, ranks: int, *, patience_s: float) -> None:
        self.store = dist.PrefixStore("watch", store.clone())  # a connection of its own: who waits on another one locks it
        self.rank, self.ranks, self.patience_s = rank, ranks, patience_s
        self.depth, self.since, self.thread = 0, time.monotonic(), get_ident()
        self.signs = 0
        self.seen: dict[int, tuple[bytes, float]] = {}  # the last sign of another rank, and when it was new
        self.ended = Event()
        self.store.set(f"place/{rank}", f"{socket.gethostname()} {os.getpid()} {_birth(os.getpid())}")
        self.watching = Thread(target=self._watch, name="watch", daemon=True)
        self.watching.start()

    def over(self, model: AvatarDiT) -> None:
        """What the model does is work, and each of its layers a sign that it gets on."""
        for block in model.blocks:
            if block is not None:
                block.register_forward_pre_hook(lambda module, args: self.beat())
        for name in (*ENTRIES, "forward"):
            setattr(model, name, self._as_work(getattr(model, name)))

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Inside this, nothing that gets on for too long is a fault."""
        self.beat()
        self.thread, self.depth = get_ident(), self.depth + 1
        try:
            yield
        finally:
            self.depth -= 1
            self.beat()

    def beat(self) -> None:
        """It gets on."""
        self.since = time.monotonic()

    def explain(self, error: BaseException) -> None:
        """Tell all ranks of an error of this one. Raises OtherRank when it is the fault of another, MemoryError when that is it."""
        try:
            fault = self._blame(error)
        except dist.DistNetworkError as lost:
            fault = _keeper_gone(lost)
            log.critical("%s", fault)
        if fault.rank != self.rank:
            raise OtherRank(str(fault)) from error
        if _is_out_of_memory(error):
            raise MemoryError(f"out of memory: {' '.join(str(error).split())}") from error

    def fault(self) -> Fault | None:
        """The first fault that somebody told of."""
        return Fault(*json.loads(self.store.get("fault"))) if self.store.check(["fault"]) else None

    def close(self) -> None:
        """This rank has done its part. The first one, whose process may keep the store, leaves last."""
        self.ended.set()
        self.watching.join()
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
                fault = _keeper_gone(lost)
            mine = fault and fault.rank == self.rank
            if fault and not self.ended.wait(HOLD_S if mine else 2 * HOLD_S):  # ranks that lose this one may still end in order
                if mine or 0 in (self.rank, fault.rank):
                    log.critical("%s", fault)
                os._exit(1)  # the work hangs in a place that no exception reaches

    def _look(self) -> Fault | None:
        """Give a sign, and look at the others."""
        self.signs += 1
        self.store.set(f"sign/{self.rank}", str(self.signs))
        stuck = self.depth > 0 and time.monotonic() - self.since > self.patience_s
        where, waits = self._where() if stuck else ("", False)
        self.store.set(f"waits/{self.rank}", where if waits else "")
        return self.fault() or (self._stuck(where, waits=waits) if stuck else None) or self._neighbour()

    def _stuck(self, where: str, *, waits: bool) -> Fault | None:
        """A rank that waits for others is to blame only when all do."""
        if not waits:
            sentence = f"hangs at {where}: nothing got on for {self.patience_s:g} s (parallel.timeout_s)"
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

    def _as_work(self, method):
        @wraps(method)
        def counted(*arguments, **named):
            with self.at_work():
                return method(*arguments, **named)

        return counted

    def _where(self) -> tuple[str, bool]:
        """Where the work is, and whether that is a place in which ranks wait for each other."""
        stack = traceback.extract_stack(sys._current_frames()[self.thread])
        inner = [frame for frame in stack if not any(part in frame.filename for part in BELOW)]
        waits = any(part in inner[-1].filename for part in MEETINGS)
        last = ([frame for frame in inner if waits and frame.filename.startswith(PACKAGE)] or inner)[-1]
        return f"{os.path.basename(last.filename)}:{last.lineno} {last.name}", waits


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
