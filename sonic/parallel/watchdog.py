"""The watchdog: when a rank fails, is gone, or hangs, all ranks learn which one it was and end within seconds.

torchrun sends SIGTERM to the other ranks when one has died. The watchdog says why in one sentence, and ends ranks that hang where no
exception reaches them. The ranks that work together hang when none of them makes progress, so any of them may wait for the others, for
hours.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from socket import gethostname
from threading import Event, Thread, get_ident
from types import FrameType
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.modules.module import register_module_forward_pre_hook

from sonic.config import OtherRank
from sonic.system.heartbeat import ACTIVITY, heartbeat
from sonic.system.out_of_memory import out_of_memory
from sonic.system.stdio import noted_signal, signals_noted

LOOK_S = 0.5  # seconds between two looks of a watchdog
SILENT_LOOKS = 4  # looks during which every rank that runs gives a sign
LOST_LOOKS = 12  # the same where nothing else speaks for a loss: one call of a library may keep a rank from giving signs
DOUBT_S = 10.0  # seconds without progress after which silent ranks are looked for: torchrun kills all 30 s after the first death
HOLD_S = 5.0  # seconds that a rank has to end by itself after a fault
PACKAGE = f"{Path(__file__).parents[1]}{os.sep}"
CPU = torch.device("cpu")
STOPPED = "was stopped"
GONE = "gives no more signs of life: it was killed (by the system when memory ran out?), or its machine is gone"

log = logging.getLogger("sonic")
NUMBERS = count()  # of this process's watchdogs, so that each has its own keys


class Fault(NamedTuple):
    """The rank that caused the end of the job, and what happened to it."""

    rank: int
    sentence: str
    host: str = ""  # where it is not this process's

    def __str__(self) -> str:
        return f"rank {self.rank}{self.host and f' on {self.host}'}: {self.sentence}"


@contextmanager
def watch_ranks(
    rank: int, ranks: int, *, device: torch.device, patience_s: float, peers: Sequence[int] = (), leave: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Watch the ranks of the process group inside the `with` block; `leave` is called before the watchdog is closed.

    `peers` are the ranks that work together with this one (default: all). Raises OtherRank in place of an error that another rank caused.
    """
    watchdog = None
    if ranks > 1:
        store = dist.distributed_c10d._get_default_store()
        watchdog = Watchdog(store, rank, peers or range(ranks), patience_s=patience_s, device=device)
        watchdog.thread.start()
    try:
        yield
    except BaseException as error:
        if watchdog:
            with signals_noted(""):  # torchrun ends this rank because another one has died, which takes a moment to find out
                watchdog.explain(error)
        raise
    finally:
        leave()
        if watchdog:
            watchdog.close()


class Watchdog:
    """A thread of each rank that counts the progress of all peers in a key-value store, and reports it when there is none.

    The store still works when connections between ranks are lost. With NCCL a rank that waits for others has work pending on its device,
    while its host stands in a copy or in `item`; where the host hangs, the device has finished what it was given.
    """

    def __init__(self, store: dist.Store, rank: int, peers: Sequence[int], *, patience_s: float, device: torch.device = CPU) -> None:
        # a separate connection, because a waiting call locks its connection
        self.store = dist.PrefixStore(f"watchdog{next(NUMBERS)}", store.clone())
        self.shared = dist.PrefixStore(f"peers{peers[0]}", self.store)  # the keys of the ranks that work together
        self.rank, self.peers, self.patience_s, self.main = rank, list(peers), patience_s, get_ident()
        self.looks, self.heartbeats = 0, -1  # of this process; the latter at the last look
        self.progress, self.since = -1, time.monotonic()  # looks of all peers that saw heartbeats; when this number last grew
        self.failed = False  # an exception ends the main thread
        self.stream = torch.cuda.default_stream(device) if device.type == "cuda" else None
        self.store.set(f"host/{rank}", gethostname())
        self.ended, self.thread = Event(), Thread(target=self._watch, name="watchdog", daemon=True)
        self.hook = register_module_forward_pre_hook(lambda module, args: heartbeat())

    def _watch(self) -> None:
        """Look until the watchdog is closed; end this process when there is a fault and it does not end by itself."""
        while not self.ended.wait(LOOK_S):
            try:
                fault = self.look()
            except dist.DistNetworkError:
                return  # the store ends with the launcher, which then ends this process
            hangs = fault and fault.rank == self.rank and not self.failed
            if fault and not self.ended.wait(0 if hangs else HOLD_S):
                if self.rank == fault.rank or self._speaks(fault):
                    log.critical("%s", fault)
                os._exit(1)  # the main thread hangs where no exception can reach it

    def look(self) -> Fault | None:
        """Tell the peers what this rank does. Gives a fault when any rank has reported one, or when no peer makes progress."""
        progress = self._give_sign()
        if progress != self.progress:
            self.progress, self.since = progress, time.monotonic()
        still = time.monotonic() - self.since
        doubt = noted_signal() or still > DOUBT_S
        return self.fault() or (self._lost_rank() if doubt else None) or (self._hanging_rank() if still > self.patience_s else None)

    def fault(self) -> Fault | None:
        """The first fault that any rank reported."""
        return self._read(self.store.get("fault")) if self.store.check(["fault"]) else None

    def report(self, fault: Fault) -> Fault:
        """Report a fault to all ranks. Gives the first fault that any rank reported."""
        return self._read(self.store.compare_set("fault", "", json.dumps(fault[:2])))

    def _read(self, text: bytes) -> Fault:
        rank, sentence = json.loads(text)
        key = f"host/{rank}"
        host = self.store.get(key).decode() if self.store.check([key]) else ""
        return Fault(rank, sentence, "" if host == gethostname() else host)

    def explain(self, error: BaseException) -> None:
        """Report an error of this rank to all ranks. Raises OtherRank when another rank caused it."""
        self.failed, stopped = True, not isinstance(error, Exception)
        gone = self._silent_ranks() if (stopped or _is_lost_connection(error)) and not self.fault() else []
        what = out_of_memory(error) or (STOPPED if stopped else f"{type(error).__name__}: {error}")
        fault = self.report(Fault(gone[0], GONE) if gone else Fault(self.rank, " ".join(what.split())))
        met_by_all = isinstance(error, ValueError | OSError) or (stopped and fault.sentence == STOPPED)
        if fault.rank != self.rank and not met_by_all:
            if self.rank and self._speaks(fault) and fault.sentence == GONE:  # the first rank, which would say it, is gone
                log.critical("%s", fault)
            raise OtherRank(str(fault)) from error

    def _speaks(self, fault: Fault) -> bool:
        """Whether this rank is the first of those that a fault leaves."""
        return self.rank == int(fault.rank == 0)

    def close(self) -> None:
        """Stop watching; the peers no longer expect signs of this rank."""
        self.ended.set()
        if self.thread.is_alive():
            self.thread.join()
        self.hook.remove()
        with suppress(dist.DistNetworkError):  # the store ends with the launcher
            self.shared.set(f"sign/{self.rank}", "")

    def _lost_rank(self) -> Fault | None:
        """Report a peer that gives no more signs, before torchrun kills this process."""
        silent = self._silent_ranks(LOST_LOOKS)
        return self.report(Fault(silent[0], GONE)) if silent else None

    def _hanging_rank(self) -> Fault | None:
        """Report the peers that do not wait for others, and the lines where they hang; None when one makes progress after all."""
        silent = self._silent_ranks()
        if self._give_sign() != self.progress:
            return None
        if silent:
            return self.report(Fault(silent[0], GONE))
        signs = sorted((*sign.split(" ", 3)[1:], rank) for rank, sign in self._signs().items())  # the oldest last heartbeat first
        hang = {rank: line for _, waits, line, rank in signs if line and waits == "False"}
        hang = hang or {rank: line or "a message from another rank" for _, _, line, rank in signs}
        first, *others = hang
        also = "".join(f"; rank {rank} at {hang[rank]}" for rank in others)
        return self.report(Fault(first, f"hangs at {hang[first]}{also}: nothing got on for {self.patience_s:g} s (timeout_s)"))

    def _silent_ranks(self, looks: int = SILENT_LOOKS) -> list[int]:
        """The other peers that give no signs during so many looks."""
        before = self._signs()
        for _ in range(looks):
            if self.ended.wait(LOOK_S):
                return []
            self._give_sign()
        return [rank for rank, sign in self._signs().items() if rank != self.rank and sign == before.get(rank)]

    def _give_sign(self) -> int:
        """Tell the peers what this rank does, and count it when it has made progress. Gives the count of all peers."""
        lines = {thread: _lines(frame) for thread, frame in sys._current_frames().items() if thread != get_ident()}
        idle = not lines.get(self.main)  # as between two calls of the Python interface
        moved = ACTIVITY.heartbeats != self.heartbeats or bool(ACTIVITY.paused) or idle
        self.looks, self.heartbeats = self.looks + 1, ACTIVITY.heartbeats
        working = [line for thread, line in lines.items() if line and thread not in ACTIVITY.waiting]
        quiet = time.time() - ACTIVITY.last > self.patience_s / 2  # before, the stream may be captured as a graph, which a query would end
        waits = quiet and self.stream is not None and not self.stream.query()
        self.shared.set(f"sign/{self.rank}", f"{self.looks} {ACTIVITY.last:017.6f} {waits} {' and '.join(working)}")
        return self.shared.add("progress", int(moved))

    def _signs(self) -> dict[int, str]:
        """The last sign of each peer that watches: the number of its looks, the time of its last heartbeat, whether it waits for its
        device, and the lines of code that it executes."""
        keys = {rank: f"sign/{rank}" for rank in self.peers}
        signs = {rank: self.shared.get(key).decode() for rank, key in keys.items() if self.shared.check([key])}
        return {rank: sign for rank, sign in signs.items() if sign}


def _lines(frame: FrameType | None) -> str:
    """The line that a thread executes, and the line of this package that called it; empty for a thread outside of this package."""
    innermost = []
    while frame and not frame.f_code.co_filename.startswith(PACKAGE):
        innermost = innermost or [frame]
        frame = frame.f_back
    named = [f"{os.path.basename(each.f_code.co_filename)}:{each.f_lineno} {each.f_code.co_name}" for each in (*innermost, frame) if each]
    return ", called by ".join(named) if frame else ""


def _is_lost_connection(error: BaseException) -> bool:
    """Whether a connection to another rank was lost; for gloo torch raises a plain RuntimeError."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
