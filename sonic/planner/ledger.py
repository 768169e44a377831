"""Counts the bytes of all tensors that are alive while a program runs on fake tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.tensor import DTensor

ANSWERS = {torch.bool: True, torch.float32: 0.5, torch.float64: 0.5, torch.bfloat16: 0.5}  # `tensor.item()` by dtype; others: 0


class Ledger(MemTracker):
    """Tracks the bytes of all live tensors, in total and not by module, because modules are called through methods other than forward.

    Fake tensors have no values, so `item()` gives a constant from ANSWERS; the program then runs unchanged.
    Views are not tracked, which saves time: every tensor is registered, or created under the ledger.
    """

    def _pre_fw_hook(self, *_: Any) -> None:
        """Does nothing: no statistics by module are kept."""

    _post_fw_hook = _pre_bw_hook = _post_bw_hook = _pre_fw_hook

    def __torch_dispatch__(self, func: Any, types: tuple, *given: Any) -> Any:
        args, named = given
        if func is torch.ops.prim.device.default:  # by far the most frequent call
            return args[0].fake_device
        if func is torch.ops.aten._local_scalar_dense.default:
            return ANSWERS.get(args[0].dtype, 0)
        if func.is_view and DTensor not in types:
            return func(*args, **(named or {}))
        return super().__torch_dispatch__(func, types, args, named or {})

    def lap(self) -> int:
        """Peak bytes since the last call of `lap`; resets the peak to the present value."""
        peak = self.total("peak")
        self._peak_mem_snap = self.get_tracker_snapshot()
        self._peak_mem = {device: each["Total"] for device, each in self._peak_mem_snap.items()}
        return peak

    def total(self, when: str) -> int:
        """Bytes on devices, without the host's; `when` is "current" or "peak"."""
        return sum(each["Total"] for device, each in self.get_tracker_snapshot(when).items() if device.type != "cpu")
