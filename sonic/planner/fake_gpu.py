"""A GPU that is not there: a device for fake tensors, on which the planner runs the program as a GPU would, on any machine."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import Library, fallthrough_kernel
from torch.testing._internal.distributed.fake_pg import _create_fake_pg
from torch.utils._pytree import tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME, KEY = "fakegpu", "PrivateUse1"  # KEY is torch's name of the one type of device that it leaves to others
ATEN, ALL = Library("aten", "IMPL"), Library("_", "IMPL")
NARROW = "mm addmm bmm baddbmm matmul linear conv1d conv2d conv3d scaled_dot_product_attention"  # computed by autocast in its dtype
WIDE = "layer_norm rms_norm softmax.int log_softmax.int mse_loss exp sum pow.Tensor_Scalar norm.Scalar"  # and these in float32


class FakeGpuMode(FakeTensorMode):
    """Mode in which new tensors are fake. Those of Python values are made on the host and copied, since the device has no kernels.

    Backward passes run in the thread that asks for them: autograd starts a thread for each device that it finds at the first backward
    pass of a process, and this device may come later.
    """

    avoid_device_init = True
    depth = 0  # of modes that are entered: outside of all of them there is no device

    def __enter__(self) -> FakeGpuMode:
        if FakeGpuMode.depth == 0:
            self.threads = torch.autograd.set_multithreading_enabled(False)
        FakeGpuMode.depth += 1
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        FakeGpuMode.depth -= 1
        if FakeGpuMode.depth == 0:
            self.threads.__exit__(*raised)

    def dispatch(self, func: Any, *given: Any) -> Any:
        """The result of one operation on shapes; pinned memory, which fake tensors do not have, is memory of the host."""
        return given[1][0] if func is torch.ops.aten._pin_memory.default else super().dispatch(func, *given)


class Hooks(torch._C._acc.PrivateUse1Hooks):
    """What torch asks of the device: it is there while a mode is entered, so that the rest of the process does without it."""

    def is_built(self) -> bool:
        """Always."""
        return True

    def is_available(self) -> bool:
        """Inside of a mode."""
        return FakeGpuMode.depth > 0

    def has_primary_context(self, _: int) -> bool:
        """Inside of a mode."""
        return FakeGpuMode.depth > 0


class Stream(torch.cpu.Stream):
    """A stream that does nothing. One of the usual priority, on which FSDP averages gradients between copies of shards, gives events,
    which FSDP asserts; the others give none, since to wait for theirs FSDP asks the accelerator for its stream, and this one has none."""

    def __init__(self, priority: int = 0) -> None:
        self.usual = priority == 0

    def record_event(self) -> torch.cpu.Event | None:
        """An event that has happened."""
        return torch.cpu.Event() if self.usual else None


class FakeGpuGenerator(torch.Generator):
    """A generator of random numbers for the device."""

    @property
    def device(self) -> torch.device:
        """The device."""
        return fake_gpu()


@cache
def fake_gpu() -> torch.device:
    """The device, which torch takes for the accelerator of this process inside of a FakeGpuMode.

    A device of type `cuda` needs a build of torch for CUDA. This one is neither `cpu` nor `cuda`: the program takes the branches for
    whatever is no CPU. As on CUDA, attention and the RMS norm are one kernel each, and autocast casts the same operations.
    """
    threads = SimpleNamespace(**vars(torch.cpu))  # its streams and events do nothing
    threads.device_count, threads.current_device, threads.get_amp_supported_dtype = lambda: 1, lambda: 0, lambda: [torch.bfloat16]
    threads.is_available, threads.Stream = lambda: FakeGpuMode.depth > 0, Stream
    _setup_privateuseone_for_python_backend(NAME, threads, Hooks())
    dist.Backend.register_backend(dist.Backend.FAKE, _create_fake_pg, extended_api=True, devices=["cpu", NAME])
    ATEN.impl("scaled_dot_product_attention", _attention, f"Autograd{KEY}")
    for name in ("_fused_rms_norm", "_fused_rms_norm_backward"):
        ATEN.impl(name, _no_kernel, KEY)  # with a kernel for the device, torch does not take the operation apart
    ALL.fallback(fallthrough_kernel, f"Autocast{KEY}")
    for names, dtype in ((NARROW, torch.bfloat16), (WIDE, torch.float32)):
        for name in names.split():
            ATEN.impl(name, _casting(name, dtype), f"Autocast{KEY}")
    return torch.device(NAME, 0)


def _attention(queries: Tensor, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> Tensor:
    """Softmax attention in one kernel.  [B,heads,N,d] -> [B,heads,N,d]"""
    return torch.ops.aten._scaled_dot_product_flash_attention(queries, keys, values)[0]


def _no_kernel(*_: Any) -> None:
    raise AssertionError("the fake GPU computes nothing: its tensors are fake")


def _casting(name: str, dtype: torch.dtype) -> Callable[..., Any]:
    """The operation as autocast runs it: on its floating-point tensors in `dtype`."""
    packet, _, overload = name.partition(".")
    operation = getattr(getattr(torch.ops.aten, packet), overload or "default")

    def converted(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    def run(*args: Any, **named: Any) -> Any:
        with torch.autocast(NAME, enabled=False):
            return operation(*tree_map_only(Tensor, converted, args), **tree_map_only(Tensor, converted, named))

    return run
