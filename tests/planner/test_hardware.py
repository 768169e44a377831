"""Detection of the machine that a job is planned for."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sonic.cli import Entry, compose, group_choices, run_command
from sonic.commands import plan_command
from sonic.parallel.parallel_config import HardwareConfig, PlanConfig
from sonic.planner import hardware
from sonic.planner.hardware import RATES, machine_here

ROOT = Path(__file__).resolve().parents[2]
PLAN = Entry("plan", PlanConfig)
H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture
def machine(monkeypatch):
    """Simulates a machine with `count` GPUs of a name; none when the name is empty."""

    def has(count: int, name: str, gib: float = 80) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(count))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        found = SimpleNamespace(name=name, total_memory=gib * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
        monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: True)
        monkeypatch.setattr(hardware, "nvlinks", lambda: 18)

    return has


def looked_up(*items: str) -> HardwareConfig:
    return machine_here(compose(PLAN, ["hardware=here", *items]).hardware)


@pytest.mark.parametrize("count", [1, 2, 8])
def test_all_devices_are_planned_for_unless_fewer_are_set(machine, count):
    machine(count, H100)
    assert looked_up().devices == count
    assert looked_up("hardware.devices=1").devices == 1
    assert looked_up().usable_gib == looked_up("hardware.devices=1").usable_gib
    assert looked_up().link == ("nvlink" if count > 1 else "none")


def test_more_ranks_than_devices_share_these(machine):
    machine(2, H100)
    assert looked_up("hardware.devices=4").usable_gib == looked_up().usable_gib / 2


def test_a_machine_without_a_gpu_is_one_device(machine):
    machine(0, "")
    assert looked_up().devices == 1
    assert looked_up("hardware.devices=2").devices == 2


@pytest.mark.parametrize(
    ("name", "described"),
    [
        ("NVIDIA L40S", "1x48gb"),
        ("NVIDIA GeForce RTX 4090", "1x24gb"),
        (H100, "1x80gb"),
        ("NVIDIA H200", "1xh200"),
    ],
)
def test_a_device_has_the_speed_of_its_hardware_file(machine, name, described):
    machine(1, name)
    found, file = looked_up(), compose(PLAN, [f"hardware={described}"]).hardware
    assert (found.tflops, found.memory_gbps) == (file.tflops, file.memory_gbps)


def test_the_longest_matching_device_name_counts(machine):
    rates = {}
    for name in ("NVIDIA L40", "NVIDIA L40S", "NVIDIA RTX 6000 Ada Generation", "NVIDIA RTX A6000"):
        machine(1, name)
        rates[name] = looked_up().tflops
    assert rates == {
        "NVIDIA L40": RATES["L40"][0],
        "NVIDIA L40S": 2 * RATES["L40"][0],
        "NVIDIA RTX 6000 Ada Generation": 2 * RATES["L40"][0],
        "NVIDIA RTX A6000": RATES["A6000"][0],
    }


def test_hardware_that_a_file_describes_is_not_looked_up(machine):
    machine(8, H100)
    for name in set(group_choices("hardware")) - {"here"}:
        asked = compose(PLAN, [f"hardware={name}"]).hardware
        assert machine_here(asked) is asked
        assert asked.devices >= 1
    with pytest.raises(ValueError, match=r"hardware\.devices=0: need 1"):
        compose(PLAN, ["hardware=4x24gb", "hardware.devices=0"])


def test_the_command_plans_for_all_devices_of_the_machine(machine, tmp_path):
    machine(8, H100)
    asked = ["model=live_avatar_14b", "hardware=here", f"json={tmp_path / 'plan.json'}"]
    assert run_command(PLAN, plan_command.plan, asked) == 0
    assert len(json.loads((tmp_path / "plan.json").read_text())["chosen"]["peak_gib_per_rank"]) == 8
