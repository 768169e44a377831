"""Runs the command infer on several ranks, as forked processes without a launcher, which saves their imports."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from ranks import PRELOAD, store_of_launcher

from sonic.cli import run_command
from sonic.commands import infer_command
from sonic.parallel import watchdog

TIMEOUT_S = 240.0


def infer_on(count: int, argv: Sequence[str], folder: Path, *, before: Callable[[int], object] = int) -> tuple[list[int], str]:
    """(exit codes of the ranks, their output); `before(rank)` is called on each of them first."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, "sonic.inference.batch", "librosa.filters"])
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    arguments = [*argv, "device=cpu", "run.threads=1", f"run.folder={folder / 'runs'}"]
    output = folder / "said"
    processes = [context.Process(target=_rank, args=((rank, count, store.port), arguments, output, before)) for rank in range(count)]
    for process in processes:
        process.start()
    until = time.monotonic() + TIMEOUT_S
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
    alive = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    assert not alive, f"ranks {alive} do not end: {output.read_text()}"
    return [process.exitcode for process in processes], output.read_text()


def _rank(rank_of: tuple[int, int, int], argv: Sequence[str], output: Path, before: Callable[[int], object]) -> None:
    rank, count, port = rank_of
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    os.environ |= store_of_launcher(port)
    sys.stdout = sys.stderr = output.open("a", buffering=1)
    torch.set_num_threads(1)
    watchdog.LOOK_S, watchdog.HOLD_S = 0.1, 1.0
    before(rank)
    sys.exit(run_command(infer_command.ENTRY, infer_command.infer, argv))
