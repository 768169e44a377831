"""The sections of the device check run on a (fake) CUDA device, at the true width, and report every figure that they are judged by."""

from __future__ import annotations

import warnings
from collections import Counter
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import pytest
import torch
from fake_cuda import CUDA, fake_cuda_mode

from sonic.check import case as case_module
from sonic.check import job_sections, kernel_sections
from sonic.check.case import case_of
from sonic.check.check_config import CheckConfig
from sonic.check.figures import BOUNDS, Figures
from sonic.check.measure import SlowCopies
from sonic.parallel import parallelize

SHALLOW = ("model.trunk.num_layers=3", "model.audio.inject_layers=[0,2]", "decode.online=false")  # a fake device has one thread
BUSY_MS = 20.0  # of every interval between two events
SECTIONS = {
    **{name: getattr(kernel_sections, name) for name in ("env", "kernels", "vae")},
    **{name: getattr(job_sections, name) for name in ("single", "video")},
}


def answers_of_cuda() -> dict:
    """What torch.cuda says on a machine with an H200; streams and events do nothing."""
    properties = SimpleNamespace(name="NVIDIA H200", total_memory=150 * 10**9, major=9, minor=0)
    return {
        **{"is_available": lambda: True, "is_initialized": lambda: False, "device_count": lambda: 1, "current_device": lambda: 0},
        **{"get_device_properties": lambda device: properties, "get_device_name": lambda device: properties.name},
        **{"set_device": MagicMock(), "synchronize": MagicMock(), "empty_cache": MagicMock(), "reset_peak_memory_stats": MagicMock()},
        **{"max_memory_reserved": lambda device: 10**9, "mem_get_info": lambda device: (10**11, 10**11)},
        "Event": lambda **named: MagicMock(elapsed_time=lambda end: BUSY_MS),
        **{"Stream": MagicMock(), "current_stream": MagicMock(), "stream": lambda stream: nullcontext()},
        **{"cudart": MagicMock(), "check_error": MagicMock(), "_sleep": MagicMock(), "get_sync_debug_mode": lambda: 0},
        "set_sync_debug_mode": lambda mode: warnings.warn("called a synchronizing CUDA operation", stacklevel=1) if mode else None,
    }


def figures_of(name: str, folder: str) -> dict[str, dict]:
    """The figures of a section on fake CUDA."""
    found: list[dict] = []
    with ExitStack() as stack:
        cuda = answers_of_cuda()
        stack.enter_context(fake_cuda_mode())  # before it is said that there is a GPU, which the mode would use
        stack.enter_context(patch.multiple(torch.cuda, **cuda))
        stack.enter_context(patch.object(case_module, "VIDEO", (*case_module.VIDEO, *SHALLOW)))
        stack.enter_context(patch.multiple(job_sections, WARM=2, TIMED=1, BLOCKS=1, product_tflops=lambda work, device: 700.0))
        plain = {name: way for name, way in kernel_sections.VAE_WAYS.items() if "channels_last" not in name}  # which fake weights cannot be
        stack.enter_context(patch.multiple(kernel_sections, VAE_WAYS=plain, PAST=5))
        for module in (case_module, job_sections, parallelize):
            stack.enter_context(patch.object(module, "fill_randomly", MagicMock()))
        for module in (job_sections, kernel_sections):  # a CPU build of torch profiles no kernels
            stack.enter_context(patch.object(module, "kernels_of", lambda run: (run(), Counter(kernel=BUSY_MS / 1000))[1]))
        case = case_of(CheckConfig(device="cuda"), Path(folder))
        figures = Figures(name, found.append, "NVIDIA H200")
        SECTIONS[name](case, figures)
    assert case.on_gpu and not figures.missing
    return {record["figure"]: record for record in found}


@pytest.mark.parametrize("name", SECTIONS)
def test_fake_cuda_runs_every_figure_of_a_section(fake_cuda, name, tmp_path):
    figures = fake_cuda(figures_of, name, str(tmp_path))
    assert {each.partition(".")[2] for each in BOUNDS if each.startswith(f"{name}.")} <= set(figures)
    assert all(record["value"] is not None for record in figures.values())
    if name == "single":  # what `set_sync_debug_mode` above said is counted, by line
        assert figures["syncs"]["value"] == 1 and "test_fake_cuda_check.py:" in figures["syncs"]["unit"]


def delayed_copies() -> int:
    """How many of these copies are delayed: two between host and device, two within the device."""
    with fake_cuda_mode(), patch.object(torch.cuda, "_sleep", MagicMock()) as sleep:
        here, there = torch.empty(3), torch.empty(3, device=CUDA)
        with SlowCopies():
            there.copy_(here, non_blocking=True)
            here.to(CUDA, non_blocking=True)
            there.copy_(torch.ones_like(there))
            there.to(torch.bfloat16)
        return sleep.call_count


def test_fake_cuda_delays_copies_between_host_and_device_alone(fake_cuda):
    assert fake_cuda(delayed_copies) == 2
