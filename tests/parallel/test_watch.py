"""When one rank dies, fails, hangs or runs out of memory, all end soon, and what is said first is about that rank."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from plan_case import conditions_for
from ranks import PRELOAD, on_ranks
from tiny import spans_of

from sonic.app import Entry, run_command
from sonic.config import SamplerConfig
from sonic.infer.films import open_parts
from sonic.infer.ranks import rollout_together
from sonic.infer.rollout import Draws
from sonic.infer.settings import InferConfig
from sonic.model.dit import AvatarDiT
from sonic.parallel import watch
from sonic.parallel.watch import Watch

RANKS = 3
PATIENCE_S, SOON_S, START_S = 4.0, 20.0, 120.0
SIZE = (9, 12)


def broken() -> None:
    raise RuntimeError("the weights fell over")


WAYS = {  # what happens to a rank in the middle of a film, and what is said of it
    "dies": (lambda: os.kill(os.getpid(), signal.SIGKILL), "gives no more signs of life"),
    "freezes": (lambda: os.kill(os.getpid(), signal.SIGSTOP), "gives no more signs of life"),
    "fails": (broken, "a fault of the program"),
    "hangs": (lambda: time.sleep(1000), "hangs at test_watch.py"),
    "runs out of memory": (lambda: torch.empty(2**50), "out of memory"),
}


def film(config: InferConfig, run) -> None:
    """Latents of a film, by all ranks."""
    with open_parts(config, run.ranks) as (parts, world, _):
        if world.leads:
            told = conditions_for(config.model, 4 * 3, SIZE)
            sampler = SamplerConfig(name="euler", schedule="linear", sample_steps=2)
            draws = Draws(torch.Generator().manual_seed(0))
            for _ in rollout_together(parts.model, told, spans_of(4, 3), sampler=sampler, draws=draws):
                time.sleep(0.01)


def job(place: tuple[int, int, Path], plan: str, way: str, *, victim: int) -> None:
    """A process of a job that nobody supervises."""
    rank, port, said = place
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.stderr = said.open("a", buffering=1)
    torch.set_num_threads(1)
    watch.LOOK_S, watch.HOLD_S = 0.1, 2.0
    if rank == victim:
        travel, calls = AvatarDiT.travel, []

        def sabotaged(*arguments):
            calls.append(1)
            if len(calls) == 3:
                (said.parent / "struck").touch()
                WAYS[way][0]()
            return travel(*arguments)

        AvatarDiT.travel = sabotaged
    argv = [f"parallel={plan}", f"parallel.timeout_s={PATIENCE_S}", "model=preview", "device=cpu", f"run.folder={said.parent / 'runs'}"]
    sys.exit(run_command(Entry("infer", InferConfig, max_ranks=RANKS), film, argv))


def free_port() -> int:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        return server.getsockname()[1]


def strike_of(marker: Path) -> float:
    """When the victim was struck."""
    until = time.monotonic() + START_S
    while not marker.exists():
        assert time.monotonic() < until, "the film does not begin"
        time.sleep(0.05)
    return marker.stat().st_mtime


@pytest.mark.parametrize(
    ("plan", "way", "victim"),
    [*(("pipeline", way, 1) for way in WAYS), ("fsdp", "dies", 1), ("fsdp", "hangs", 1), ("context", "dies", 0)],
)
def test_a_rank_that_ends_ends_the_job_and_is_named_first(plan, way, victim, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    said, port = tmp_path / "stderr", free_port()
    processes = [context.Process(target=job, args=((rank, port, said), plan, way), kwargs={"victim": victim}) for rank in range(RANKS)]
    for process in processes:
        process.start()
    try:
        struck = strike_of(tmp_path / "struck")
        for process in processes:
            process.join(max(0.0, struck + SOON_S - time.time()))
        text = said.read_text()
        assert not any(process.is_alive() for process in processes), text
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert all(process.exitcode for process in processes), text
    first, *others = [line for line in text.splitlines() if line.startswith("sonic:")]
    assert f"rank {victim}: " in first, text
    assert (WAYS[way][1] if victim else "gone") in first, text
    assert all(f"rank {victim}" in line or "is ended" in line for line in others), text  # the others know as well


def miss_each_other(patience_s: float) -> str:
    """What is said of two ranks, each of which waits for a word of the other."""
    watch.LOOK_S, watch.HOLD_S = 0.1, 0.0
    watched = Watch(dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size(), patience_s=patience_s)
    watched.ended.set()  # the looks are ours
    watched.watching.join()
    other = 1 - dist.get_rank()
    waiting = threading.Thread(target=wait_at_work, args=(watched, other), daemon=True)
    waiting.start()
    until = time.monotonic() + 20 * patience_s
    while (fault := watched._look()) is None and time.monotonic() < until:
        time.sleep(0.1)
    dist.barrier()
    dist.send(torch.zeros(1), other)
    waiting.join()
    return str(fault)


def wait_at_work(watched: Watch, other: int) -> None:
    with watched.at_work():
        dist.recv(torch.empty(1), other)


def test_ranks_that_wait_for_each_other_are_found():
    said = on_ranks(2, miss_each_other, 0.5, timeout_s=30)
    assert said[0] == said[1]
    assert "all ranks wait for each other: rank 0 at" in said[0]


def rest_long(patience_s: float) -> bool:
    """Whether a rank that rests for longer than the patience is left alone, and one that gets on slowly as well."""
    watch.LOOK_S = 0.1
    watched = Watch(dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size(), patience_s=patience_s)
    time.sleep(2.5 * patience_s if dist.get_rank() else 0)
    with watched.at_work():
        for _ in range(4):
            time.sleep(0.5 * patience_s)
            watched.beat()
    dist.barrier()
    fault = watched.fault()
    dist.barrier()
    watched.close()
    return fault is None


def test_ranks_that_rest_or_get_on_slowly_are_left_alone():
    assert on_ranks(2, rest_long, 1.0, timeout_s=60) == [True, True]
