"""The sections of the device check run on a (fake) CUDA device, at the true width, and report every figure that they are judged by."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import pytest
import torch
from fake_cuda import fake_cuda_mode

from sonic.check import case as case_module
from sonic.check import job_sections, kernel_sections
from sonic.check.case import case_of
from sonic.check.check_config import CheckConfig
from sonic.check.figures import BOUNDS, Figures
from sonic.parallel import parallelize

SHALLOW = ("model.trunk.num_layers=3", "model.audio.inject_layers=[0,2]", "decode.online=false")  # a fake device has one thread
BUSY_S = 0.02  # of the kernels of a block
SECTIONS = {
    **{name: getattr(kernel_sections, name) for name in ("env", "kernels", "vae")},
    **{name: getattr(job_sections, name) for name in ("single", "offload", "video")},
}


def answers_of_cuda() -> dict:
    """What torch.cuda says on a machine with an H200."""
    properties = SimpleNamespace(name="NVIDIA H200", total_memory=150 * 10**9, major=9, minor=0)
    return {
        **{"is_available": lambda: True, "is_initialized": lambda: False, "device_count": lambda: 1, "current_device": lambda: 0},
        **{"get_device_properties": lambda device: properties, "get_device_name": lambda device: properties.name},
        **{"set_device": MagicMock(), "synchronize": MagicMock(), "empty_cache": MagicMock(), "reset_peak_memory_stats": MagicMock()},
        **{"max_memory_reserved": lambda device: 10**9, "mem_get_info": lambda device: (10**11, 10**11)},
        **{"memory_allocated": lambda device: 0, "max_memory_allocated": lambda device: 10**9},
        "set_sync_debug_mode": lambda mode: (
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1) if mode == "warn" else None
        ),
    }


def figures_of(name: str, folder: str) -> dict[str, dict]:
    """The figures of a section on fake CUDA."""
    found: list[dict] = []
    with ExitStack() as stack:
        cuda = answers_of_cuda()
        stack.enter_context(fake_cuda_mode())  # before it is said that there is a GPU, which the mode would use
        stack.enter_context(patch.multiple(torch.cuda, **cuda))
        stack.enter_context(patch.object(case_module, "VIDEO", (*case_module.VIDEO, *SHALLOW)))
        stack.enter_context(patch.multiple(job_sections, WARM=3, TIMED=1, BLOCKS=1, product_tflops=lambda work, device: 700.0))
        plain = {name: way for name, way in kernel_sections.VAE_WAYS.items() if "channels_last" not in name}  # which fake weights cannot be
        stack.enter_context(patch.multiple(kernel_sections, VAE_WAYS=plain, PAST=5))
        for module in (case_module, job_sections, parallelize):
            stack.enter_context(patch.object(module, "fill_randomly", MagicMock()))
        stack.enter_context(patch.object(job_sections, "kernel_seconds", lambda run: (run(), BUSY_S)[1]))  # a CPU build profiles none
        stack.enter_context(patch.object(job_sections, "OFFLOADING", job_sections.OFFLOADING[-1:]))  # a slot for weights cannot be fake
        stack.enter_context(patch.object(job_sections, "missing_compiler", lambda device: ""))
        stack.enter_context(patch.object(torch, "compile", lambda function: function))
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
