"""Measures of a device: seconds by its own clock, its kernels, the lines that wait for it, its memory."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sonic.inference.choose_plan import Estimate

ROUNDS = 5
DELAY_CYCLES = 2_000_000  # about a millisecond of a GPU


class Clock:
    """The seconds from its making to `seconds`, by events in the current stream of a GPU, or by the clock of a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.event = _event() if device.type == "cuda" else None
        self.begun = time.perf_counter()

    def seconds(self) -> float:
        """The seconds until the work that is queued now is done."""
        if self.event is None:
            return time.perf_counter() - self.begun
        end = _event()
        end.synchronize()
        return self.event.elapsed_time(end) / 1000


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def best_seconds(run: Callable[[], object], device: torch.device, rounds: int = ROUNDS) -> float:
    """Seconds of the fastest of some runs after one to warm up."""
    run()
    found = []
    for _ in range(rounds):
        clock = Clock(device)
        run()
        found.append(clock.seconds())
    return min(found)


@contextmanager
def count_waits() -> Iterator[Counter[str]]:
    """Counts, by FILE:LINE, where the host waits for the GPU inside the `with` block; filled at its end."""
    found, before = Counter(), torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)
    found.update(f"{Path(each.filename).name}:{each.lineno}" for each in seen if "called a synchronizing" in str(each.message))


def kernels_of(run: Callable[[], object]) -> Counter[str]:
    """Seconds of each kernel and copy on the GPU by name; empty where the profiler sees none."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    found: Counter[str] = Counter()
    for event in seen.events():
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            found[event.name] += event.time_range.elapsed_us() / 1e6
    return found


class SlowCopies(TorchDispatchMode):
    """While active, every copy between host and GPU begins a millisecond late on its stream, so that what does not wait for it fails."""

    def __torch_dispatch__(self, func: Any, types: Any, *call: Any) -> Any:
        """Run an operation."""
        args, named = call if len(call) == 2 else (*call, {})
        ends = {tensor.device.type for tensor in tree_leaves(args) if isinstance(tensor, Tensor)}
        ends |= {torch.device(named["device"]).type} if named.get("device") is not None else set()
        if func in (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default) and len(ends) > 1:
            torch.cuda._sleep(DELAY_CYCLES)
        return func(*args, **named)


def differing(left: Sequence[Tensor], right: Sequence[Tensor]) -> int:
    """How many numbers of two lists of tensors differ in any bit; all, where they are not of the same shapes."""
    if [each.shape for each in left] != [each.shape for each in right]:
        return max(1, sum(each.numel() for each in left))
    return sum(int((one != other).sum()) for one, other in zip(left, right, strict=True))


def peak_over_plan(estimate: Estimate, device: torch.device, *without: str) -> float:
    """Peak memory of a GPU relative to what the plan has, less the named items, which do not run here."""
    items = estimate.plan.ranks[0]["generate"]
    planned = sum(size for name, size in items.items() if name not in without)
    return torch.cuda.max_memory_reserved(device) / planned
