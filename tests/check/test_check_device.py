"""The device check runs every section on a CPU, judges figures by their bounds, and a section that fails hides no other."""

from __future__ import annotations

import json
import os
import subprocess
import time
from unittest.mock import MagicMock

import pytest
import torch

from sonic.check import run_sections
from sonic.check.case import CheckCase
from sonic.check.check_config import LIMITS, CheckConfig
from sonic.check.figures import BOUNDS, Figures, as_line
from sonic.check.measure import DELAY_CYCLES, late_copies
from sonic.cli import run_command
from sonic.commands.check_command import ENTRY, check
from sonic.system.device_stream import CudaStream
from sonic.system.program import command_words

OF_A_GPU = {  # what a CPU cannot show
    *("numerics.float32_error", "kernels.attention_over_best", "single.rotate_share", "single.syncs", "single.busy_share"),
    *("single.peak_over_plan", "offload.late_copies", "offload.weights_rate", "vae.peak_over_plan", "video.peak_over_plan"),
    *("train.peak_over_plan", "single.compiled_error", "single.recompilations"),
}


def records_of(folder):
    (file,) = folder.glob("*/check.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_cpu_runs_every_section_and_skips_what_only_a_gpu_can_show(tmp_path):
    command = ["env", "OMP_NUM_THREADS=1", *command_words("check"), "device=cpu", f"folder={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    records = records_of(tmp_path)
    results = {record["section"]: record["result"] for record in records if record["figure"] is None}
    assert results == dict.fromkeys(LIMITS, "pass")
    figures = {f"{record['section']}.{record['figure']}": record for record in records if record["figure"]}
    assert {name for name, record in figures.items() if record["value"] is None} == OF_A_GPU
    assert {*BOUNDS} <= {*figures}
    assert all(as_line(record) in done.stdout for record in figures.values())
    assert "rank 1: gives no more signs of life" in figures["ranks.blamed"]["unit"]


def crashes(case: CheckCase, figures: Figures) -> None:
    figures.add("before", 1.0, "s")
    os.write(2, b"the driver fell over\n")
    os.abort()


def hangs(case: CheckCase, figures: Figures) -> None:
    subprocess.Popen(["sh", "-c", f"sleep 1000; touch {case.folder / 'left'}"])
    time.sleep(1000)


def is_wrong(case: CheckCase, figures: Figures) -> None:
    figures.add("differing_latents", 3)


def is_fine(case: CheckCase, figures: Figures) -> None:
    figures.add("torch", torch.__version__)


def test_a_section_that_crashes_or_hangs_hides_no_other(tmp_path, monkeypatch, capsys):
    sections = {"env": crashes, "numerics": hangs, "ranks": is_wrong, "memory": is_fine}
    for name, section in sections.items():
        monkeypatch.setitem(run_sections.SECTIONS, name, section)
    limit = 3.0
    argv = ["device=cpu", f"folder={tmp_path}", f"sections=[{','.join(reversed(sections))}]", f"limit={limit}"]
    assert run_command(ENTRY, check, argv) == 1
    outcomes = {record["section"]: record for record in records_of(tmp_path) if record["figure"] is None}
    assert [*outcomes] == [*sections]  # in their own order
    assert {name: outcome["result"] for name, outcome in outcomes.items()} == dict.fromkeys(sections, "fail") | {"memory": "pass"}
    assert "ended with SIGABRT" in outcomes["env"]["sentences"][0] and "the driver fell over" in outcomes["env"]["sentences"][0]
    assert f"was stopped after {limit:g} s" in outcomes["numerics"]["sentences"][0] and outcomes["numerics"]["seconds"] < 3 * limit
    assert outcomes["ranks"]["sentences"] == [f"differing_latents: {BOUNDS['ranks.differing_latents'].meaning}"]
    assert "env.before=1 s" in capsys.readouterr().out
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert f"touch {tmp_path}" not in running  # what the section has started ends with it


@pytest.mark.parametrize(
    ("given", "expected"),
    [("sections=[speed]", "sections=speed"), ("limit=-1", "limit=-1.0"), ("device=tpu", "device=tpu")],
)
def test_mistakes_of_the_user_are_named(given, expected, tmp_path, capsys):
    assert run_command(ENTRY, check, [given, f"folder={tmp_path / 'runs'}"]) == 2
    assert expected in capsys.readouterr().err and not (tmp_path / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused(tmp_path, capsys):
    assert run_command(ENTRY, check, ["device=cuda", f"folder={tmp_path / 'runs'}"]) == 2
    assert "has no CUDA device" in capsys.readouterr().err and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("section", "name", "value", "device", "verdict", "fails"),
    [
        ("single", "syncs", 0, "NVIDIA H200", "<= 0: pass", False),
        ("single", "syncs", 2, "NVIDIA H200", "<= 0: fail", True),
        ("single", "peak_over_plan", 0.94, "NVIDIA H100", ">= 0.95 and <= 1.05: fail", True),
        ("video", "frames_per_second_4_steps", 13.8, "NVIDIA H200", "goal on H200 >= 13.7: met", False),
        ("video", "frames_per_second_4_steps", 13.6, "NVIDIA H200", "goal on H200 >= 13.7: missed", True),
        ("video", "frames_per_second_4_steps", 5.0, "NVIDIA L40S", "goal on H200 >= 13.7: missed", False),
        ("numerics", "float32_error", float("nan"), "NVIDIA H200", "<= 0.0001: fail", True),
        ("env", "driver", "580.95", "NVIDIA H200", None, False),
    ],
)
def test_figures_are_judged_by_their_bounds_and_goals_on_their_device_alone(section, name, value, device, verdict, fails):
    found = []
    Figures(section, found.append, device).add(name, value)
    assert found[0].get("verdict") == verdict and bool(found[0].get("failed")) == fails


def test_copies_are_late_inside_the_block_alone(monkeypatch):
    cuda = MagicMock()
    monkeypatch.setattr(torch, "cuda", cuda)
    stream, (target, source) = CudaStream(torch.device("cuda"), priority=0), torch.tensor([[0.0], [1.0]])
    with late_copies():
        stream.copy(target, source)
    cuda._sleep.assert_called_once_with(DELAY_CYCLES)
    stream.copy(target, source)
    cuda._sleep.assert_called_once()


def test_limits_add_up_to_nine_minutes_and_every_bound_belongs_to_a_section():
    assert sum(LIMITS.values()) <= 540
    assert {name.partition(".")[0] for name in BOUNDS} < {*LIMITS} == {*run_sections.SECTIONS}
    assert CheckConfig().sections == []
