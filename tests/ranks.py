"""Runs a function on n gloo ranks, each in its own process, and returns the results of all ranks."""

from __future__ import annotations

import faulthandler
import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_S = 300.0  # of the whole run; a rank that hangs must not stop the suite
PRELOAD = [
    "torch._dynamo",
    "torch.distributed.fsdp",
    "sonic.inference.distributed_rollout",
    "sonic.inference.components",
    "sonic.training.build",
]


def on_ranks(count: int, work: Callable[..., Any], *arguments: Any, timeout_s: float = TIMEOUT_S) -> list[Any]:
    """`[work(*arguments) on rank 0, on rank 1, ...]`; the first error of a rank is raised here, with its traceback."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arguments_of = lambda rank: (rank, count, store.port, folder, timeout_s)  # noqa: E731
        processes = [context.Process(target=_rank, args=(arguments_of(rank), work, arguments)) for rank in range(count)]
        for process in processes:
            process.start()
        try:
            _wait(processes, folder, time.monotonic() + timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.join()
        return [pickle.loads((folder / f"{rank}.done").read_bytes()) for rank in range(count)]


def store_of_launcher(port: int) -> dict[str, str]:
    """The environment of a rank whose store outlives the ranks, as torchrun's does: it listens on `port` in another process."""
    store = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **store}


def _wait(processes: list, folder: Path, until: float) -> None:
    while any(process.is_alive() for process in processes):
        _no_error(folder)
        stacks = [f"rank {path.stem} hangs:\n{path.read_text()}" for path in sorted(folder.glob("*.stack"))]
        assert time.monotonic() < until, "\n".join(stacks)
        time.sleep(0.05)
    _no_error(folder)
    codes = [process.exitcode for process in processes]
    assert not any(codes), f"exit codes {codes}"


def _no_error(folder: Path) -> None:
    failed = sorted(folder.glob("*.failed"), key=lambda path: path.stat().st_mtime_ns)
    assert not failed, f"rank {failed[0].stem}:\n{failed[0].read_text()}"


def _rank(job: tuple[int, int, int, Path, float], work: Callable, arguments: tuple) -> None:
    rank, count, port, folder, timeout_s = job
    torch.set_num_threads(1)
    with (folder / f"{rank}.stack").open("w") as stack:
        faulthandler.dump_traceback_later(timeout_s - 2, file=stack)
        try:
            dist.init_process_group("gloo", store=dist.TCPStore("127.0.0.1", port), rank=rank, world_size=count)
            done = work(*arguments)
            dist.barrier()
            dist.destroy_process_group()
        except BaseException:
            written = folder / f"{rank}.part"
            written.write_text(traceback.format_exc())
            written.rename(folder / f"{rank}.failed")
            raise SystemExit(1) from None
    (folder / f"{rank}.done").write_bytes(pickle.dumps(done))
