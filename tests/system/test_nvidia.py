"""What is read of NVIDIA's driver: its version, the links between GPUs, and the warning when torch cannot use it."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace

import pytest
import torch

from sonic.cli import Entry, compose
from sonic.families.family import build_components
from sonic.inference import components
from sonic.inference.components import find_device
from sonic.inference.infer_config import InferConfig
from sonic.parallel.parallel_config import HardwareConfig
from sonic.planner.hardware import machine_here
from sonic.system import nvidia

CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC version:  gcc version 12.3.0\n"
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder)  Sun Jul 20 UTC 2025\n"
A100_HGX = """\
\t\x1b[4mGPU0\tGPU1\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV12\tSYS\t0-31\t0\t\tN/A
GPU1\tNV12\t X \tPXB\t0-31\t0\t\tN/A
NIC0\tSYS\tPXB\t X \t\t\t\t
"""
A100_PCIE = """\
\tGPU0\tGPU1\tCPU Affinity
GPU0\t X \tNODE\t0-31
GPU1\tNODE\t X \t0-31
"""
PAIRS_BRIDGED = """\
\tGPU0\tGPU1\tGPU2\tGPU3\tCPU Affinity
GPU0\t X \tNV4\tSYS\tSYS\t0-31
GPU1\tNV4\t X \tSYS\tSYS\t0-31
GPU2\tSYS\tSYS\t X \tNV4\t0-31
GPU3\tSYS\tSYS\tNV4\t X \t0-31
"""
H100_HGX = A100_HGX.replace("NV12", "NV18")


@pytest.fixture
def driver(monkeypatch, tmp_path):
    """Simulates a machine: the text of the driver's file ("" = none), what nvidia-smi prints (None = it is missing), its library."""

    def has(text: str = "", smi: str | None = None, library: str | None = None) -> None:
        nvidia.nvlinks.cache_clear()
        components._warn_of_unused_driver.cache_clear()
        file = tmp_path / "version"
        if text:
            file.write_text(text)
        monkeypatch.setattr(nvidia, "DRIVER", file)
        monkeypatch.setattr(nvidia, "find_library", lambda name: library)

        def run(command, **options):
            assert command[0] == "nvidia-smi"
            if smi is None:
                raise FileNotFoundError("nvidia-smi")
            return SimpleNamespace(stdout=smi)

        monkeypatch.setattr(subprocess, "run", run)

    yield has
    nvidia.nvlinks.cache_clear()
    components._warn_of_unused_driver.cache_clear()


@pytest.mark.parametrize(
    ("machine", "version"),
    [
        ({"text": CLOSED}, "535.104.05"),
        ({"text": OPEN}, "580.65.06"),
        ({"smi": "560.35.03\n560.35.03\n"}, "560.35.03"),  # as under WSL, which has no such file
        ({"library": "libcuda.so.1"}, "of unknown version"),
        ({}, ""),
    ],
)
def test_the_drivers_version_is_read_wherever_it_is_written(driver, machine, version):
    driver(**machine)
    assert nvidia.driver_version() == version


@pytest.mark.parametrize(
    ("built", "text", "available", "expected"),
    [
        (
            "13.0",
            CLOSED,
            False,
            "driver is 535.104.05, and torch is built for CUDA 13.0, which wants driver 580 or newer; update it",
        ),
        ("12.8", CLOSED, False, "which wants driver 525 or newer"),
        ("13.0", CLOSED, True, ""),  # it works
        ("13.0", "", False, ""),  # no such machine
        (None, CLOSED, False, ""),  # a build of torch for CPUs was chosen
    ],
)
def test_a_driver_that_torch_cannot_use_is_reported_once(built, text, available, expected, driver, monkeypatch, caplog):
    driver(text)
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    for _ in range(3):
        assert find_device("auto").type == ("cuda" if available else "cpu")
    assert len(caplog.messages) == bool(expected)
    assert expected in caplog.text
    find_device("cpu")  # nothing to say where the CPU is asked for
    assert len(caplog.messages) == bool(expected)


@pytest.mark.parametrize(
    ("name", "smi", "peers", "link"),
    [
        ("NVIDIA A100-SXM4-80GB", A100_HGX, True, ("nvlink", 240.0)),
        ("NVIDIA H100 80GB HBM3", H100_HGX, True, ("nvlink", 350.0)),
        ("NVIDIA A100 80GB PCIe", A100_PCIE, True, ("pcie", 20.0)),
        ("NVIDIA A100 80GB PCIe", PAIRS_BRIDGED, True, ("pcie", 20.0)),  # the slowest link counts
        ("NVIDIA A100-SXM4-80GB", None, True, ("pcie", 20.0)),  # cannot be read
        ("NVIDIA A100-SXM4-80GB", "no devices were found", True, ("pcie", 20.0)),
        ("NVIDIA RTX A6000", PAIRS_BRIDGED.replace("SYS", "NV4"), True, ("nvlink", 80.0)),
        ("NVIDIA L40S", A100_PCIE, False, ("host", 8.0)),
    ],
)
def test_the_planner_takes_the_links_that_are_there(name, smi, peers, link, driver, monkeypatch):
    driver(smi=smi)
    found = SimpleNamespace(name=name, total_memory=80 * 2**30)
    for attribute, value in {
        "is_available": lambda: True, "device_count": lambda: 2, "get_device_properties": lambda device: found,
        "can_device_access_peer": lambda one, other: peers,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, attribute, value)
    here = machine_here(HardwareConfig("here", devices=2))
    assert (here.link, here.link_gbps) == link


@pytest.mark.parametrize(("dtype", "rounded"), [(torch.float32, False), (torch.bfloat16, True)])
def test_convolutions_are_rounded_to_tf32_unless_float32_is_asked_for(dtype, rounded):
    before = torch.backends.cudnn.allow_tf32
    try:
        run = compose(Entry("infer", InferConfig), ["device=cpu", f"run.dtype={str(dtype).removeprefix('torch.')}"]).run
        build_components(compose(Entry("infer", InferConfig), []).model, run, steps=4)
        assert torch.backends.cudnn.allow_tf32 is rounded
        assert not torch.backends.cuda.matmul.allow_tf32  # products in float32 never are
    finally:
        torch.backends.cudnn.allow_tf32 = before
