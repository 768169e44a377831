"""Signals during a training in real processes: the step under way is saved, the same command continues it; a dead rank is named."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import PRELOAD, store_of_launcher
from run_files import read_scalars
from safetensors.torch import load_file, save_file

from sonic.cli import launch
from sonic.commands.train_command import ENTRY, train
from sonic.data.clips import write_index
from sonic.parallel import watchdog
from sonic.system import stdio
from sonic.training.engine import Engine

SOON_S, STEPS = 100.0, 8
GONE = "gives no more signs of life"


def training(folder: Path, ranks: int = 1) -> list[str]:
    """The options of a training in a folder, to which its clips are written."""
    rng = torch.Generator().manual_seed(0)
    clips = [f"c{number}" for number in range(3)]
    tensors = {f"{clip}/mel": torch.randn(48, 40, generator=rng) for clip in clips}
    tensors |= {f"{clip}/visemes": torch.rand(24, 5, generator=rng) for clip in clips}
    (folder / "clips").mkdir()
    save_file(tensors, folder / "clips/a.safetensors")
    entry = {"shard": "a.safetensors", "latent_frames": 6, "tensors": ["mel", "visemes"]}
    write_index(folder / "clips", [{"name": clip, **entry} for clip in clips], seed=7)
    budget = [f"budget.max_steps={STEPS}", "budget.batch_size=1", f"budget.accumulate={ranks}", "log.every_steps=1", "log.bar=false"]
    return ["objective=viseme", "data.folder=clips", "data.window=6", "speed.device=cpu", *budget]


def command(folder: Path, argv: list[str], rank: int, ranks: int, port: int) -> None:
    """One process of `sonic train`, as the launcher starts it; a file of the folder says at each step that it was begun."""
    os.chdir(folder)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    os.environ |= {**store_of_launcher(port), "TORCHELASTIC_RUN_ID": "1"} if ranks > 1 else {}
    for name, stream in (("stdout", sys.stdout), ("stderr", sys.stderr)):
        os.dup2(os.open(f"{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    torch.set_num_threads(1)
    watchdog.LOOK_S, stdio.SAME_S = 0.2, 0.5
    step, slow = Engine.step, json.loads(Path("slow.json").read_text())

    def slow_step(engine: Engine, role: str, *, rate: float, step_: int) -> torch.Tensor:
        Path(f"at{rank}_{step_}").touch()
        time.sleep(slow)
        return step(engine, role, rate=rate, step=step_)

    Engine.step = lambda engine, role, *, rate, step: slow_step(engine, role, rate=rate, step_=step)
    launch(ENTRY, train, argv)


class Job:
    """The processes of a training; `reach` waits until a rank is in a step."""

    def __init__(self, folder: Path, argv: list[str], *, ranks: int = 1, slow_s: float = 0.3) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.folder, self.store = folder, dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        (folder / "slow.json").write_text(json.dumps(slow_s))
        for old in [*folder.glob("at*"), *folder.glob("std*")]:
            old.unlink()
        given = [(folder, argv, rank, ranks, self.store.port) for rank in range(ranks)]
        self.processes = [context.Process(target=command, args=arguments) for arguments in given]
        for process in self.processes:
            process.start()

    def reach(self, step: int, rank: int = 0) -> Job:
        until = time.monotonic() + SOON_S
        while not (self.folder / f"at{rank}_{step}").exists():
            assert time.monotonic() < until and self.processes[rank].is_alive(), self.text()
            time.sleep(0.02)
        return self

    def signal(self, number: int, rank: int = 0) -> Job:
        os.kill(self.processes[rank].pid, number)
        return self

    def end(self) -> list[int]:
        """The exit codes."""
        try:
            until = time.monotonic() + SOON_S
            for process in self.processes:
                process.join(max(0.0, until - time.monotonic()))
            assert not any(process.is_alive() for process in self.processes), self.text()
        finally:
            for process in self.processes:
                process.kill()
                process.join()
        return [process.exitcode for process in self.processes]

    def text(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("std*")))


def curve(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["student/loss"]) for line in read_scalars(folder)]


@pytest.mark.parametrize(("name", "step"), [("SIGINT", 0), ("SIGTERM", 3), ("SIGUSR1", STEPS - 1)])
def test_a_signal_saves_the_step_under_way_and_the_same_command_continues_bit_for_bit(name, step, tmp_path):
    """In the first step, in the middle and in the last; the weights that are exported are those of a training without a break."""
    argv, number = training(tmp_path), getattr(signal, name)
    job = Job(tmp_path, [*argv, "name=broken", "export=broken.safetensors"]).reach(step).signal(number)
    assert job.end() == [128 + number], job.text()
    assert f"saved step {step + 1}; the same command continues" in job.text() and "Traceback" not in job.text()
    assert [path.name for path in (tmp_path / "runs/broken/checkpoints").iterdir()] == [f"step_{step + 1:08d}"]
    assert not (tmp_path / "broken.safetensors").exists()
    for run in ("broken", "whole"):
        assert Job(tmp_path, [*argv, f"name={run}", f"export={run}.safetensors"], slow_s=0.0).end() == [0]
    assert curve(tmp_path / "runs/broken") == curve(tmp_path / "runs/whole") and len(curve(tmp_path / "runs/whole")) == STEPS
    broken, whole = (load_file(tmp_path / f"{run}.safetensors") for run in ("broken", "whole"))
    assert broken.keys() == whole.keys() and all(torch.equal(broken[key], whole[key]) for key in whole)


def test_a_second_signal_stops_at_once(tmp_path):
    job = Job(tmp_path, [*training(tmp_path), "name=r"], slow_s=30.0).reach(0)
    for _ in range(3):
        job.signal(signal.SIGTERM)
        time.sleep(0.4)
    assert job.end() == [128 + signal.SIGTERM] and "stopped; what was finished stays" in job.text()
    assert "a second signal stops at once" in job.text() and not list((tmp_path / "runs/r").glob("checkpoints/step_*"))


def test_a_signal_to_one_of_two_ranks_ends_both_at_the_same_step(tmp_path):
    argv = training(tmp_path, ranks=2)
    job = Job(tmp_path, [*argv, "name=broken"], ranks=2).reach(2, rank=1).signal(signal.SIGUSR1, rank=1)
    assert job.end() == [128 + signal.SIGUSR1] * 2, job.text()
    assert job.text().count("saved step 3; the same command continues") == 1 and "sonic: error" not in job.text()
    for run in ("broken", "whole"):
        assert Job(tmp_path, [*argv, f"name={run}"], ranks=2, slow_s=0.0).end() == [0, 0]
    assert curve(tmp_path / "runs/broken") == curve(tmp_path / "runs/whole")


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_ranks_that_are_stopped_because_one_was_killed_name_it(victim, tmp_path):
    """torchrun sends SIGTERM to the others as soon as one has died."""
    job = Job(tmp_path, [*training(tmp_path, ranks=3), "name=r"], ranks=3).reach(1, rank=victim).signal(signal.SIGKILL, rank=victim)
    job.processes[victim].join(SOON_S)
    for rank in {0, 1, 2} - {victim}:
        job.signal(signal.SIGTERM, rank)
    assert job.end() == [-signal.SIGKILL if rank == victim else 1 for rank in range(3)], job.text()
    assert f"rank {victim}: {GONE}" in job.text() and "stopped;" not in job.text() and "Traceback" not in job.text()
