"""Streams of a CPU that do their work late, each in a thread, so that a missing wait or an early reuse shows as wrong numbers.

A copy is done when its turn comes, and before it its target is spoiled. What a function computes on a stream is spoiled at once, and put
right when its turn comes. The CPU itself does all work at once; so that its work too can be missed, `ACCESSES` counts it, and a stream
that uses memory without having waited for all that the CPU did with that memory leaves it spoiled.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Queue
from typing import Any
from unittest.mock import patch

import torch
from fake_cuda import NO_KERNEL
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sonic.system import device_stream
from sonic.system.device_stream import DeviceStream, HostEvent

SPOILED = 97  # what memory holds before the work that fills it is done
DELAY_S = 0.001


class Accesses(TorchDispatchMode):
    """Numbers the operations of this thread, and remembers for each piece of memory the last one that read or wrote it."""

    def __init__(self) -> None:
        super().__init__()
        self.number, self.last, self.counts = 0, {}, True

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if self.counts and func.__name__.split(".")[0] not in NO_KERNEL:
            self.number += 1
            for each in tree_leaves((args, kwargs, found)):
                if isinstance(each, Tensor):
                    self.last[each.untyped_storage().data_ptr()] = self.number
        return found

    def new(self, tensor: Tensor) -> Tensor:
        """The tensor, whose memory a stream has just allocated."""
        self.last.pop(tensor.untyped_storage().data_ptr(), None)
        return tensor

    def after(self, tensors: Any) -> int:
        """The number of the last operation with the memory of these tensors."""
        pointers = [each.untyped_storage().data_ptr() for each in tensors if isinstance(each, Tensor)]
        return max((self.last.get(pointer, 0) for pointer in pointers), default=0)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done in the `with` block is not work of the CPU."""
        self.counts = False
        try:
            yield
        finally:
            self.counts = True


ACCESSES = [Accesses()]  # the one in use


class LateEvent(HostEvent):
    """A point in the work of a stream; `number` is the last operation of the CPU that is done then for sure."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.reached = number, threading.Event()

    def reach(self) -> None:
        self.time = time.perf_counter()
        self.reached.set()

    def synchronize(self) -> None:
        assert self.reached.wait(60), "a stream waits for what never comes"

    def query(self) -> bool:
        return self.reached.is_set()


class InOrder(DeviceStream):
    """What a CPU does itself: at once, but a wait for a late stream is real."""

    def record(self, *, timed: bool = False) -> LateEvent:
        event = LateEvent(ACCESSES[0].number)
        event.reach()
        return event

    def wait(self, event: LateEvent) -> None:
        event.synchronize()


class LateStream(DeviceStream):
    """A stream whose work is done in a thread, DELAY_S after its turn."""

    def __init__(self, device: torch.device, priority: int) -> None:
        super().__init__(device, priority)
        self.queue: Queue[Callable[[], object]] = Queue()
        self.number = 0  # the last operation of the CPU that this stream waited for
        threading.Thread(target=self._work, daemon=True).start()

    def record(self, *, timed: bool = False) -> LateEvent:
        event = LateEvent(self.number)
        self.queue.put(event.reach)
        return event

    def wait(self, event: LateEvent) -> None:
        self.number = max(self.number, event.number)
        self.queue.put(event.synchronize)

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        early = self.number < ACCESSES[0].after(arguments)
        self.record().synchronize()  # its work begins after what is queued
        with ACCESSES[0].paused():
            found = function(*arguments)
            for tensor in {id(each): each for each in tree_leaves(found) if isinstance(each, Tensor)}.values():
                right = ACCESSES[0].new(tensor).clone()
                self._fill(tensor.fill_(SPOILED), tensor if early else right)
        return found

    def copy(self, target: Tensor, source: Tensor) -> None:
        early = self.number < ACCESSES[0].after((target, source))
        self._fill(target, target if early else source)

    def host_memory(self, like: Tensor) -> Tensor:
        with ACCESSES[0].paused():
            return ACCESSES[0].new(super().host_memory(like)).fill_(SPOILED)

    def _fill(self, target: Tensor, source: Tensor) -> None:
        for step in (lambda: target.fill_(SPOILED), lambda: time.sleep(DELAY_S), lambda: target.copy_(source)):
            self.queue.put(step)

    @torch.no_grad()
    def _work(self) -> None:
        while True:
            self.queue.get()()


@contextmanager
def delayed_streams() -> Iterator[None]:
    """Inside the `with` block all streams of the CPU are late."""
    device_stream.stream_on.cache_clear()
    stream_of = lambda device, priority=None: InOrder(device) if priority is None else LateStream(device, priority)  # noqa: E731
    with patch.dict(device_stream.STREAMS, {"cpu": stream_of}), Accesses() as ACCESSES[0]:
        yield
    device_stream.stream_on.cache_clear()
