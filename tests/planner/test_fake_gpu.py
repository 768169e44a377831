"""The device of the planner's dry run: the program takes the branches of a device that is no CPU, and torch computes as on CUDA."""

from __future__ import annotations

import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_track import PLAN, WIDE, tracked_gib
from torch.utils._python_dispatch import TorchDispatchMode

from sonic.cli import compose
from sonic.model import blocks
from sonic.planner import fake_gpu as fake_gpu_module
from sonic.planner.fake_gpu import NAME, FakeGpuMode, fake_gpu
from sonic.planner.search import search_plans

MODEL = Path(blocks.__file__).parent
CHOICES = {"attention.py", "block_causal.py", "compile.py"}  # which kernel attends, and how long to compile: no tensor more or less
EXTRA = 16  # copies of the activations that the planted branch holds


class Names(TorchDispatchMode):
    """Context that lists the operations."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found.append(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("branch", "noticed"), [(lambda x: x.device.type != "cpu", True), (lambda x: x.device.type == "cpu", False)])
def test_the_dry_run_sees_what_only_devices_do(branch, noticed, monkeypatch):
    found = search_plans(compose(PLAN, [*WIDE, "hardware=1xh200", "parallel=single"]))
    (before,), original = tracked_gib(found), blocks.linear_gelu

    def planted(layer, x):
        held = x.new_empty(EXTRA, *x.shape) if branch(x) else None
        return original(layer, x), held

    monkeypatch.setattr(blocks, "linear_gelu", lambda layer, x: planted(layer, x)[0])
    (after,) = tracked_gib(found)
    extra = EXTRA * found.work.activation_bytes / 2**30
    assert (0.4 * extra < after - before <= extra) if noticed else after == before


def operations():
    """Names of the operations of attention and norms, forward and backward, on a device that comes after the first backward pass."""
    torch.ones(1, requires_grad=True).sum().backward()
    with fake_gpu(), FakeGpuMode(), Names() as names:
        rows, weight = (torch.empty(*shape, dtype=torch.bfloat16, requires_grad=True) for shape in ((1, 2, 64, 32), (32,)))
        (F.scaled_dot_product_attention(rows, rows, rows) + F.rms_norm(rows, (32,), weight) + F.layer_norm(rows, (32,))).sum().backward()
    return names.found


def test_attention_and_norms_are_one_kernel_each_with_gradients_too():
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # autograd counts the devices at the first backward pass of a process
        found = set(pool.submit(operations).result())
    kernels = {"_scaled_dot_product_flash_attention", "_fused_rms_norm", "native_layer_norm"}
    assert kernels | {f"{name}_backward" for name in kernels} <= found
    assert not {"bmm", "softmax", "_softmax", "rsqrt", "_to_copy"} & found


def test_autocast_computes_products_in_half_precision_and_norms_in_float32():
    with fake_gpu(), FakeGpuMode(), torch.autocast(NAME, torch.bfloat16):
        x, half = torch.empty(4, 32), torch.empty(4, 32, dtype=torch.bfloat16)
        assert F.linear(x, torch.empty(8, 32), torch.empty(8)).dtype == (x @ x.T).dtype == torch.bfloat16
        assert F.layer_norm(half, (32,)).dtype == F.rms_norm(half, (32,)).dtype == F.mse_loss(half, half).dtype == torch.float32
        assert (half + half).dtype == torch.bfloat16
        assert F.gelu(half).dtype == torch.bfloat16


def test_autocast_of_the_device_casts_what_autocast_of_cuda_casts():
    for name in (*fake_gpu_module.NARROW.split(), *fake_gpu_module.WIDE.split()):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "AutocastCUDA"), name


def test_tensors_of_python_values_are_on_the_device():
    with fake_gpu(), FakeGpuMode():
        x = torch.empty(2)
        made = torch.tensor([1.0]), x.new_tensor([1.0]), torch.as_tensor([1]), x.cpu().to(x.device)
        assert {str(each.device) for each in made} == {f"{NAME}:0"}


def test_the_model_asks_only_whether_a_device_is_the_cpu():
    """The dry run's device is no CPU and not called cuda either: a branch for cuda alone would not be counted."""
    lines = [(path.name, line.strip()) for path in MODEL.glob("*.py") for line in path.read_text().splitlines()]
    asks = [(name, line) for name, line in lines if re.search(r"""is_cuda|["']cuda""", line)]
    assert {name for name, _ in asks} <= CHOICES
