"""Measures of a device: its seconds, its kernels, the lines that wait for it, its memory, and how far results differ."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from sonic.inference.choose_plan import Estimate
from sonic.system.device_stream import CudaStream, current_stream

DELAY_CYCLES = 1_000_000  # about half a millisecond of a GPU


def seconds_of(run: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds of the device for what `run` queues, and those that the host needs to queue it."""
    stream, started = current_stream(device), time.perf_counter()
    begun = stream.record(timed=True)
    run()
    end, queued = stream.record(timed=True), time.perf_counter() - started
    end.synchronize()
    return begun.elapsed_time(end) / 1000, queued


def best_seconds(run: Callable[[], object], device: torch.device, rounds: int = 5) -> float:
    """Seconds of the device for the fastest of some runs after one to warm up."""
    run()
    return min(seconds_of(run, device)[0] for _ in range(rounds))


@contextmanager
def count_waits() -> Iterator[Counter[str]]:
    """Counts, by FILE:LINE, where the host waits for the GPU inside the `with` block; filled at its end."""
    found = Counter()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        yield found
        torch.cuda.set_sync_debug_mode("default")
    found.update(f"{Path(each.filename).name}:{each.lineno}" for each in seen if "called a synchronizing" in str(each.message))


def kernel_seconds(run: Callable[[], object]) -> float:
    """Seconds of all kernels and copies on the GPU; 0 where the profiler sees none."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    events = (event for event in seen.events() if event.device_type == DeviceType.CUDA and not event.is_user_annotation)
    return sum(event.time_range.elapsed_us() for event in events) / 1e6


@contextmanager
def late_copies() -> Iterator[None]:
    """Inside the `with` block all copies on streams of their own begin late, so that work which does not wait for them is wrong."""
    CudaStream.delay_cycles = DELAY_CYCLES
    yield
    CudaStream.delay_cycles = 0


def differing(left: Sequence[Tensor], right: Sequence[Tensor]) -> int:
    """How many numbers of two lists of tensors differ."""
    return sum(int((one != other).sum()) for one, other in zip(left, right, strict=True))


def error_of(found: Tensor, true: Tensor) -> float:
    """Norm of the difference relative to that of the true numbers."""
    return float((found.float() - true.float()).norm() / true.float().norm())


def peak_over_plan(estimate: Estimate, device: torch.device, *without: str) -> float:
    """Peak memory of a GPU relative to what the plan has, less the named items, which do not run here."""
    items = estimate.plan.ranks[0]["generate"]
    return torch.cuda.max_memory_reserved(device) / sum(size for name, size in items.items() if name not in without)
