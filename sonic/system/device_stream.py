"""Work of a device beside the work that is queued for it already: copies and decoding, with events between the streams."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
NORMAL, HIGH = 0, -1  # priorities: work of a stream with a high one goes first when others wait for the device too


class HostEvent:
    """A point in the work of a device that does all work at once, with the methods of torch.cuda.Event."""

    def __init__(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        """Return, because the work before this point is done."""

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: HostEvent) -> float:
        return 1000 * (end.time - self.time)


Event = HostEvent | torch.cuda.Event


class DeviceStream:
    """A queue of work for a device, apart from others; without a priority, the one to which torch adds the work of this thread.

    This class is for devices without streams, such as a CPU, which do all work at once.
    """

    def __init__(self, device: torch.device, priority: int | None = None) -> None:
        self.device = device

    def record(self, *, timed: bool = False) -> Event:
        """The point after all work queued so far; `timed` when `elapsed_time` will be asked."""
        return HostEvent()

    def wait(self, event: Event) -> None:
        """Let the work queued from now on begin after the event."""

    def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function whose work is queued here; the memory of tensors among its arguments is not reused before that work is done."""
        return function(*arguments)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Queue a copy. Between a device and pinned memory it does not make the host wait."""
        self.run(lambda *pair: pair[0].copy_(pair[1], non_blocking=True), target, source)

    def host_memory(self, like: Tensor) -> Tensor:
        """Memory of the host for a copy of `like`, pinned where it is on a GPU."""
        return torch.empty_like(like, device="cpu", pin_memory=like.is_cuda)

    def pin(self, memory: Tensor, owner: object) -> None:
        """Pin host memory where it is, for a GPU, until `owner` is freed and the copies of this stream are done."""


class CudaStream(DeviceStream):
    """A CUDA stream. Before its work `delay_cycles` of the GPU pass, with which a check finds those who do not wait for that work."""

    delay_cycles = 0

    def __init__(self, device: torch.device, priority: int | None = None) -> None:
        super().__init__(device)
        self.stream = torch.cuda.current_stream(device) if priority is None else torch.cuda.Stream(device, priority)

    def record(self, *, timed: bool = False) -> Event:
        return self.stream.record_event(torch.cuda.Event(enable_timing=timed))

    def wait(self, event: Event) -> None:
        self.stream.wait_event(event)

    def run(self, function: Callable[..., T], *arguments: Any) -> T:
        with torch.cuda.stream(self.stream):
            if self.delay_cycles:
                torch.cuda._sleep(self.delay_cycles)
            found = function(*arguments)
        for each in arguments:
            if isinstance(each, Tensor) and each.is_cuda:
                each.record_stream(self.stream)
        return found

    def pin(self, memory: Tensor, owner: object) -> None:
        cuda, storage = torch.cuda.cudart(), memory.untyped_storage()  # torch's pin_memory would round its size up to a power of two
        torch.cuda.check_error(cuda.cudaHostRegister(storage.data_ptr(), storage.nbytes(), 0))
        unpin = lambda address: (self.stream.synchronize(), cuda.cudaHostUnregister(address))  # noqa: E731
        weakref.finalize(owner, unpin, storage.data_ptr()).atexit = False


STREAMS: dict[str, type[DeviceStream]] = {"cuda": CudaStream}  # by type of device
HOST = DeviceStream(torch.device("cpu"))


def current_stream(device: torch.device) -> DeviceStream:
    """The stream to which torch adds the work of this thread on a device."""
    return STREAMS.get(device.type, DeviceStream)(device)


def stream_for(purpose: str, device: torch.device, priority: int = NORMAL) -> DeviceStream:
    """The stream of a device for one purpose: always the same one, also where the device is called `cuda` here and `cuda:0` there."""
    return stream_on(purpose, torch.empty(0, device=device).device, priority)


@cache
def stream_on(purpose: str, device: torch.device, priority: int) -> DeviceStream:
    """The same for a device with its index."""
    return STREAMS.get(device.type, DeviceStream)(device, priority)


def to_host(tensors: Sequence[Tensor], after: DeviceStream) -> tuple[list[Tensor], Event]:
    """Begin to copy tensors to the host after the work of a stream; the copies may be read once the host has waited for the event."""
    copies = stream_for("copies to the host", after.device)
    copies.wait(after.record())
    found = [copies.host_memory(each) for each in tensors]
    for target, source in zip(found, tensors, strict=True):
        copies.copy(target, source)
    return found, copies.record()
