"""When one rank dies, fails, hangs or runs out of memory, all ranks end soon, and the first message is about that rank."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from hanging import every_file_hangs, looking
from infer_command import small_inputs
from plan_case import conditions_for
from ranks import PRELOAD, on_ranks, store_of_launcher
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
from sonic.inference.stream import buffer_all
from sonic.model.dit import AvatarDiT
from sonic.parallel import watchdog
from sonic.parallel.watchdog import Fault, Watchdog
from sonic.system.heartbeat import heartbeat, pause_watchdog, waiting_for_others

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
    """One process of a job, whose launcher does not end it."""
    rank, port, output = arguments
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)}
    os.environ |= store_of_launcher(port)
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
    output, store = tmp_path / "stderr", dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = [
        context.Process(target=job, args=((rank, store.port, output), plan, way), kwargs={"victim": victim, "busy": busy})
        for rank in range(RANKS)
    ]
    for process in processes:
        process.start()
    try:
        struck = strike_of(tmp_path / "struck")
        able = [process for rank, process in enumerate(processes) if (rank, way) != (victim, "freezes")]
        for process in able:
            process.join(max(0.0, struck + SOON_S - time.time()))
        text = output.read_text()
        assert not any(process.is_alive() for process in able), text  # torchrun kills a frozen process when another one has ended
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert all(process.exitcode for process in able), text
    first, *others = [line for line in text.splitlines() if line.startswith("sonic:")]
    assert f"rank {victim}: " in first, text
    assert (WAYS[way][1] if victim else "gone") in first, text
    assert all(f"rank {victim}" in line for line in others), text  # the others know as well


def fault_in(scene: Callable[[int, threading.Thread], Iterator[None]], patience_s: float, long_s: float, *, on_cuda: bool = False) -> str:
    """What the watchdog of this rank finds within `long_s` while the library runs a scene on each of two ranks; "None" if it is fine."""
    watchdog.LOOK_S = 0.1
    rank, found = dist.get_rank(), []
    device = torch.device("cuda" if on_cuda else "cpu", 0)
    ours = Watchdog(dist.distributed_c10d._get_default_store(), rank, range(2), patience_s=patience_s, device=device)
    looks = looking(ours, found, long_s)
    list(buffer_all(scene(rank, looks)))
    looks.join()
    dist.barrier()
    ours.close()
    return found[0]


def each_waits_for_the_other(rank: int, looks: threading.Thread) -> Iterator[None]:
    """No rank sends before both receive."""
    sender = threading.Thread(target=lambda: looks.join() or dist.send(torch.zeros(1), 1 - rank), daemon=True)
    sender.start()
    with waiting_for_others():
        dist.recv(torch.empty(1), 1 - rank)
    yield
    sender.join()


def one_waits_and_one_hangs(rank: int, looks: threading.Thread) -> Iterator[None]:
    """The first rank waits for a message of the second, which hangs."""
    if rank:
        looks.join()
        dist.send(torch.zeros(1), 0)
    else:
        with waiting_for_others():
            dist.recv(torch.empty(1), 1)
    yield


def one_waits_and_one_takes_its_time(rank: int, looks: threading.Thread) -> Iterator[None]:
    """The first rank waits for longer than the timeout, while the second pauses its watchdog and then progresses slowly."""
    if rank:
        with pause_watchdog():
            time.sleep(2.0)
        for _ in range(4):
            time.sleep(0.5)
            nn.Identity()(0)
        dist.send(torch.zeros(1), 0)
    else:
        with waiting_for_others():
            dist.recv(torch.empty(1), 1)
    yield


def test_ranks_that_wait_for_each_other_are_found():
    found = on_ranks(2, fault_in, each_waits_for_the_other, 1.0, 20.0, timeout_s=60)
    assert found[0] == found[1]
    assert found[0].startswith("rank 0: hangs at a message from another rank; rank 1 at a message from another rank: nothing got on")


def test_only_the_rank_that_does_not_wait_is_named():
    found = on_ranks(2, fault_in, one_waits_and_one_hangs, 1.0, 20.0, timeout_s=60)
    assert found[0] == found[1]
    assert found[0].startswith("rank 1: hangs at threading.py")
    assert "called by stream.py" in found[0] and "rank 0" not in found[0]


def one_waits_for_its_device_and_one_rests(rank: int, looks: threading.Thread) -> Iterator[None]:
    """The first rank stands in a C call that waits for the device, as with NCCL; the second rests, with a heartbeat after it began to."""
    if rank:
        time.sleep(0.5)
        heartbeat()
    yield looks.join()


def both_wait_for_their_devices(rank: int, looks: threading.Thread) -> Iterator[None]:
    """Both ranks stand so; the second has stopped first."""
    if not rank:
        time.sleep(0.5)
        heartbeat()
    yield looks.join()


def fault_with_devices(scene: Callable[[int, threading.Thread], Iterator[None]], busy: Sequence[int]) -> str:
    """What `fault_in` finds where work is pending on the devices of the ranks `busy` and none on the others'."""
    stream = SimpleNamespace(query=lambda: dist.get_rank() not in busy)
    torch.cuda.default_stream = lambda device: stream
    heartbeat()
    return fault_in(scene, 1.5, 20.0, on_cuda=True)


@pytest.mark.parametrize("resting", [0, 1])
def test_a_rank_that_waits_for_its_device_is_not_blamed_for_the_one_that_rests(resting):
    waiting = 1 - resting
    found = on_ranks(2, fault_with_devices, one_waits_for_its_device_and_one_rests, [waiting], timeout_s=60)
    assert found[0] == found[1]
    assert found[0].startswith(f"rank {resting}: hangs at threading.py") and f"rank {waiting}" not in found[0]


def test_when_all_wait_for_their_devices_the_first_to_stop_is_named_first():
    found = on_ranks(2, fault_with_devices, both_wait_for_their_devices, [0, 1], timeout_s=60)
    assert found[0] == found[1]
    assert re.match(r"rank 1: hangs at threading.py.*; rank 0 at threading.py", found[0])


def test_ranks_that_wait_or_pause_or_progress_slowly_are_not_ended():
    assert on_ranks(2, fault_in, one_waits_and_one_takes_its_time, 1.5, 3.5, timeout_s=60) == ["None", "None"]


def test_a_rank_is_not_ended_between_two_calls_of_the_library():
    ours, found = Watchdog(dist.HashStore(), 0, [0], patience_s=0.2), []
    looking(ours, found, 1.0).join()
    ours.close()
    assert found == ["None"]


def test_a_hang_anywhere_in_the_making_of_a_video_is_found(tmp_path):
    inputs, config = small_inputs(12), compose(Entry("infer", InferConfig), ["device=cpu", "sampler.sample_steps=1"])
    with every_file_hangs() as found, open_components(config, Ranks()) as opened:
        make_video(inputs, opened.components, config, output=tmp_path / "out.mp4", timer=StageTimer())
    assert {Path(file).parent.name for file in found} >= {"checkpoint", "encoders", "inference", "model", "sampling", "vae", "data"}


def test_an_error_on_all_ranks_is_reported_as_it_is_and_any_other_as_that_of_the_first_rank_to_fail():
    store = dist.HashStore()
    theirs, ours = (Watchdog(store, rank, range(2), patience_s=1.0) for rank in (1, 0))
    ours.store = theirs.store  # the watchdogs of one job have one number
    assert theirs.report(Fault(1, "the weights fell over")) == ours.fault()
    for mistake in (ValueError("no such file"), OSError("the disk is full")):
        ours.explain(mistake)
    with pytest.raises(OtherRank, match="rank 1: the weights fell over"):
        ours.explain(RuntimeError("lost"))
    for each in (theirs, ours):
        each.close()
