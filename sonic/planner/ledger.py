"""Bytes of all tensors that are alive while a program runs on fake tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.tensor import DTensor

ANSWERS = {torch.bool: True, torch.float32: 0.5, torch.float64: 0.5, torch.bfloat16: 0.5}  # to who asks for a number; others: 0


class Ledger(MemTracker):
    """Bytes of all that is alive. Modules are entered by several doors, so nothing is asked of them; a number that the program wants
    of a tensor without numbers is made up, so that it runs as it is.

    With `skip_views`, for programs all of whose tensors are given or made under the ledger, views take no time; elsewhere a view is
    how a tensor that was made before becomes known.
    """

    def __init__(self, *, skip_views: bool = False) -> None:
        super().__init__()
        self.skip_views = skip_views

    def _pre_fw_hook(self, *_: Any) -> None:
        """Nothing is kept by module."""

    _post_fw_hook = _pre_bw_hook = _post_bw_hook = _pre_fw_hook

    def __torch_dispatch__(self, func: Any, types: tuple, *given: Any) -> Any:
        args, named = given
        if func is torch.ops.prim.device.default:  # the most frequent question by far
            return args[0].fake_device
        if func is torch.ops.aten._local_scalar_dense.default:
            return ANSWERS.get(args[0].dtype, 0)
        if self.skip_views and func.is_view and DTensor not in types:
            return func(*args, **(named or {}))
        return super().__torch_dispatch__(func, types, args, named or {})

    def lap(self) -> int:
        """The most since the last call."""
        peak = total_bytes(self, "peak")
        self._peak_mem_snap = self.get_tracker_snapshot()
        self._peak_mem = {device: each["Total"] for device, each in self._peak_mem_snap.items()}
        return peak


def total_bytes(tracker: MemTracker, when: str) -> int:
    """Of all devices, "current" or at the "peak"."""
    return sum(device["Total"] for device in tracker.get_tracker_snapshot(when).values())
