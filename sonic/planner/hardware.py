"""Detects the hardware of this machine, for `hardware=here`."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

from sonic.geometry import GIB
from sonic.parallel.parallel_config import HardwareConfig
from sonic.system.nvidia import nvlinks

HERE = "here"  # value of hardware.name that asks for detection
USABLE = 0.94  # fraction of a GPU's memory that a process can use
PROCESS_GIB = 0.6  # GiB that Python and torch take in a rank without an accelerator
CGROUP = Path("/sys/fs/cgroup/memory.max")
# (bfloat16 TFLOPS without sparsity, accumulated in float32; memory bandwidth in 10^9 bytes/s), both from the vendor's data sheets, by a
# part of the device's name; the longest match wins
RATES = {
    "B200": (2250, 8000),
    "H200": (989, 4800),
    "H100": (989, 3350),
    "H100 PCIe": (756, 2000),
    "A100": (312, 2039),
    "A100 80GB PCIe": (312, 1935),
    "A100-PCIE-40GB": (312, 1555),
    "A100-SXM4-40GB": (312, 1555),
    "L40S": (362, 864),
    "L40": (181, 864),
    "6000 Ada": (362, 960),
    "4090": (165, 1008),
    "5090": (209, 1792),
    "A6000": (155, 768),
    "3090": (71, 936),
}
UNKNOWN_RATE = (100, 800)
NVLINK_GBPS = 20.0, 350.0  # that collectives reach over one NVLink of 25 (Ampere, Hopper), and over all of a device
PCIE, THROUGH_HOST = 20, 8  # 10^9 bytes/s over PCIe 4 x16 between cards that can access each other, and through host memory
CARDS = {  # (usable GiB, GiB of these in reserve, 10^9 bytes/s to another card, from host memory) of cards as they are usually sold
    "H200": (138.0, 1.0, NVLINK_GBPS[1], 50),
    "H100": (78.0, 1.0, NVLINK_GBPS[1], 50),
    "A100": (78.0, 1.0, 12 * NVLINK_GBPS[0], 25),
    "4090": (22.2, 0.4, THROUGH_HOST, 25),
    "L40S": (44.0, 0.6, PCIE, 25),
}


def hardware_here(asked: HardwareConfig, device: torch.device, *, ranks: int, local_ranks: int) -> HardwareConfig:
    """The detected hardware of `ranks` processes, `local_ranks` of them on this machine; a named hardware only gets these.

    Only total sizes are read, never free memory, so that all ranks get the same result.
    """
    if asked.name != HERE:
        return replace(asked, devices=local_ranks).part(ranks)
    host = host_bytes() / GIB
    if device.type != "cuda":
        usable = max(0.2, host / local_ranks - PROCESS_GIB)
        link = "host" if local_ranks > 1 else "none"
        found = {"usable_gib": usable, "reserve_gib": 0.1, "link": link, "host_gib": host + 3 * local_ranks}
        return _filled(asked, local_ranks, **found).part(ranks)
    found = torch.cuda.get_device_properties(device)
    name = max((part for part in RATES if part in found.name), key=len, default="")
    tflops, memory_gbps = RATES.get(name, UNKNOWN_RATE)
    sharing = -(-local_ranks // torch.cuda.device_count())
    link, link_gbps = _link() if local_ranks > 1 else ("none", 10.0)
    rates = {"tflops": tflops / sharing, "memory_gbps": memory_gbps / sharing, "link": link, "link_gbps": link_gbps}
    usable = USABLE * found.total_memory / GIB / sharing
    memory = {"memory_gib": found.total_memory / GIB, "usable_gib": usable, "reserve_gib": 0.4, "host_gib": 0.9 * host}
    return _filled(asked, local_ranks, **memory, **rates).part(ranks)


def _filled(asked: HardwareConfig, devices: int, **found: float | str) -> HardwareConfig:
    """`asked` with the detected values in all fields that still have their defaults."""
    usual = HardwareConfig()
    return replace(asked, devices=devices, **{name: each for name, each in found.items() if getattr(asked, name) == getattr(usual, name)})


def machine_here(asked: HardwareConfig) -> HardwareConfig:
    """The detected hardware of this machine, with `asked.devices` devices (0 = all), and of `asked.nodes` - 1 others like it; a named
    hardware is returned unchanged."""
    if asked.name != HERE:
        return asked
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    devices = asked.devices or (torch.cuda.device_count() if device.type == "cuda" else 1)
    return hardware_here(asked, device, ranks=devices * asked.nodes, local_ranks=devices)


def host_bytes() -> int:
    """Bytes of main memory of this machine, or the limit of the container if that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = CGROUP.read_text().strip() if CGROUP.exists() else "max"
    return min(total, int(limit)) if limit.isdigit() else total


def _link() -> tuple[str, float]:
    """Kind of the slowest link between two devices, as far as it can be read, and its bandwidth in 10^9 bytes/s."""
    direct = torch.cuda.device_count() > 1 and torch.cuda.can_device_access_peer(0, 1)
    if direct and nvlinks():
        return "nvlink", min(NVLINK_GBPS[0] * nvlinks(), NVLINK_GBPS[1])
    return ("pcie", float(PCIE)) if direct else ("host", float(THROUGH_HOST))


def cards(name: str, devices: int) -> HardwareConfig:
    """`devices` cards of this name in CARDS, in one machine with enough host memory."""
    (tflops, memory_gbps), (usable, reserve, link, host) = RATES[name], CARDS[name]
    rates = {"tflops": tflops, "memory_gbps": memory_gbps, "link_gbps": link, "host_gbps": host, "host_gib": 224.0 * devices}
    rates["link"] = "nvlink" if link > PCIE else "pcie"
    return HardwareConfig(f"{devices} x {name}", devices, usable_gib=usable, reserve_gib=reserve, **rates)
