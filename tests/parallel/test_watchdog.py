"""When one rank dies, fails, hangs or runs out of memory, all ranks end soon, and the first message is about that rank."""

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
from hanging import every_file_hangs, looking, unwatched
from infer_command import small_inputs
from plan_case import conditions_for
from ranks import PRELOAD, on_ranks
from tiny import spans_of
from torch import nn

from sonic.checkpoint.tensor_files import StoredTensor
from sonic.cli import Entry, compose, run_command
from sonic.config import OtherRank, Ranks, SamplerConfig
from sonic.inference.batch import open_components
from sonic.inference.distributed_rollout import distributed_rollout
from sonic.inference.generate import make_video
from sonic.inference.infer_config import InferConfig
from sonic.inference.report import StageTimer
from sonic.inference.rollout import NoiseSource, Sampling
from sonic.model.dit import AvatarDiT
from sonic.parallel import watchdog
from sonic.parallel.watchdog import Fault, Watchdog
from sonic.system.heartbeat import pause_watchdog

RANKS = 3
PATIENCE_S, SOON_S, START_S = 4.0, 20.0, 120.0
SIZE = (9, 12)


def broken() -> None:
    raise RuntimeError("the weights fell over")


STAGES = {"moves": (AvatarDiT, "run_blocks"), "loads": (StoredTensor, "part")}  # what the victim is about
WAYS = {  # what happens to a rank in the middle of a video, and what is said of it
    "dies": (lambda: os.kill(os.getpid(), signal.SIGKILL), "gives no more signs of life"),
    "freezes": (lambda: os.kill(os.getpid(), signal.SIGSTOP), "gives no more signs of life"),
    "fails": (broken, "a fault of the program"),
    "hangs": (lambda: time.sleep(1000), "hangs at test_watchdog.py"),
    "runs out of memory": (lambda: torch.empty(2**50), "out of memory"),
}


def generate(config: InferConfig, run) -> None:
    """Latents of a video, by all ranks."""
    with open_components(config, run.ranks) as opened:
        opened.serve()
        components = opened.components
        if opened.world.leads:
            conditions = conditions_for(config.model, 4 * 3, SIZE)
            sampler = SamplerConfig(name="euler", schedule="linear", sample_steps=2)
            source = NoiseSource(torch.Generator().manual_seed(0))
            settings = {"sampling": Sampling(sampler, source), "context": components.context}
            for _ in distributed_rollout(components.model, conditions, spans_of(4, 3), **settings):
                time.sleep(0.01)


def job(arguments: tuple[int, int, Path], plan: str, way: str, *, victim: int, busy: str) -> None:
    """One process of a job without a supervisor."""
    rank, port, output = arguments
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.stderr = output.open("a", buffering=1)
    torch.set_num_threads(1)
    watchdog.LOOK_S, watchdog.HOLD_S = 0.1, 2.0
    if rank == victim:
        owner, name = STAGES[busy]
        done, calls = getattr(owner, name), []

        def sabotaged(*arguments):
            calls.append(1)
            if len(calls) == 3:
                (output.parent / "struck").touch()
                WAYS[way][0]()
            return done(*arguments)

        setattr(owner, name, sabotaged)
    argv = [f"parallel={plan}", f"parallel.timeout_s={PATIENCE_S}", "model=preview", "device=cpu", f"run.folder={output.parent / 'runs'}"]
    sys.exit(run_command(Entry("infer", InferConfig, max_ranks=RANKS), generate, argv))


def free_port() -> int:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        return server.getsockname()[1]


def strike_of(marker: Path) -> float:
    """The time at which the victim was made to fail."""
    until = time.monotonic() + START_S
    while not marker.exists():
        assert time.monotonic() < until, "the video does not begin"
        time.sleep(0.05)
    return marker.stat().st_mtime


@pytest.mark.parametrize(
    ("plan", "way", "victim", "busy"),
    [
        *(("pipeline", way, 1, "moves") for way in WAYS),
        ("fsdp", "dies", 1, "moves"),
        ("fsdp", "hangs", 1, "loads"),
    ],
)
def test_a_rank_that_fails_ends_the_job_and_is_named_first(plan, way, victim, busy, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    output, port = tmp_path / "stderr", free_port()
    processes = [
        context.Process(target=job, args=((rank, port, output), plan, way), kwargs={"victim": victim, "busy": busy})
        for rank in range(RANKS)
    ]
    for process in processes:
        process.start()
    try:
        struck = strike_of(tmp_path / "struck")
        for process in processes:
            process.join(max(0.0, struck + SOON_S - time.time()))
        text = output.read_text()
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
    """The messages about two ranks that wait for each other."""
    watchdog.LOOK_S, watchdog.HOLD_S = 0.1, 0.0
    rank, found = dist.get_rank(), []
    watchdog_ = unwatched(dist.distributed_c10d._get_default_store(), rank, patience_s)
    looks = looking(watchdog_, found)
    threading.Thread(target=speak_when, args=(looks, 1 - rank), daemon=True).start()
    dist.recv(torch.empty(1), 1 - rank)
    dist.barrier()
    watchdog_.close()
    return found[0]


def speak_when(looks: threading.Thread, other: int) -> None:
    looks.join()
    dist.send(torch.zeros(1), other)


def test_ranks_that_wait_for_each_other_are_found():
    output = on_ranks(2, miss_each_other, 0.5, timeout_s=30)
    assert output[0] == output[1]
    assert "all ranks wait for each other: rank 0 at" in output[0]


def rest_long(patience_s: float) -> bool:
    """Whether a rank that waits longer than the timeout is not ended, nor one that progresses slowly or pauses the watchdog."""
    watchdog.LOOK_S = 0.1
    watchdog_ = Watchdog(dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size(), patience_s=patience_s)
    if dist.get_rank():
        with pause_watchdog():
            time.sleep(2 * patience_s)
        for _ in range(4):
            time.sleep(0.5 * patience_s)
            nn.Identity()(0)
    dist.barrier()
    fault = watchdog_.fault()
    dist.barrier()
    watchdog_.close()
    return fault is None


def test_ranks_that_wait_or_pause_or_progress_slowly_are_not_ended():
    assert on_ranks(2, rest_long, 1.0, timeout_s=60) == [True, True]


def test_a_hang_anywhere_in_the_making_of_a_video_is_found(tmp_path):
    inputs, config = small_inputs(12), compose(Entry("infer", InferConfig), ["device=cpu", "sampler.sample_steps=1"])
    with every_file_hangs() as found, open_components(config, Ranks()) as opened:
        make_video(inputs, opened.components, config, output=tmp_path / "out.mp4", timer=StageTimer())
    assert {Path(file).parent.name for file in found} >= {"checkpoint", "encoders", "inference", "model", "sampling", "vae", "data"}


def test_an_error_on_all_ranks_is_reported_as_it_is_and_any_other_as_that_of_the_first_rank_to_fail():
    store = dist.HashStore()
    ours, theirs = (unwatched(store, rank, 1.0) for rank in range(2))
    ours.store = theirs.store  # those of one job have one number
    theirs._declare(Fault(1, "the weights fell over"))
    for mistake in (ValueError("no such file"), OSError("the disk is full")):
        ours.explain(mistake)
    with pytest.raises(OtherRank, match="rank 1: the weights fell over"):
        ours.explain(RuntimeError("lost"))
    for each in (theirs, ours):
        each.close()


def test_a_rank_that_has_finished_is_not_reported_as_lost(monkeypatch):
    ours = unwatched(dist.HashStore(), 0, 0.1)
    for key, value in (("done/1", "1"), ("place/1", "elsewhere 1 never")):
        ours.store.set(key, value)
    monkeypatch.setattr(ours, "_where", lambda: ("", True))
    ours._look()
    time.sleep(0.3)
    with pause_watchdog():
        assert ours._look() is None
    ours.close()


def test_the_first_rank_exits_last():
    ours = unwatched(dist.HashStore(), 0, 1.0)
    leaves = threading.Thread(target=ours.close)
    leaves.start()
    leaves.join(0.3)
    assert leaves.is_alive()
    ours.store.set("done/1", "1")
    leaves.join(watchdog.HOLD_S / 2)
    assert not leaves.is_alive()


@pytest.mark.parametrize(("host", "birth", "ended"), [("here", "born", True), ("elsewhere", "born", False), ("here", "later", False)])
def test_only_the_intended_process_is_ended(host, birth, ended, monkeypatch):
    found = []
    monkeypatch.setattr(watchdog.os, "kill", lambda *conditions: found.append(conditions))
    mine = watchdog._birth(os.getpid())
    watchdog._end_frozen(socket.gethostname() if host == "here" else host, str(os.getpid()), mine if birth == "born" else f"{mine}0")
    assert found == [(os.getpid(), signal.SIGKILL)] * ended
