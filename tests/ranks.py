"""Runs a function on n gloo ranks, each a process of its own, and gives back what every rank returned."""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

TIMEOUT_S = 300.0  # of the whole run; a rank that hangs must not stop the suite
_PRELOAD = ["torch", "torch.distributed.fsdp", "sonic.parallel.spread", "sonic.infer.rollout"]


def on_ranks(count: int, work: Callable[..., Any], *arguments: Any, timeout_s: float = TIMEOUT_S) -> list[Any]:
    """`[work(*arguments) on rank 0, on rank 1, ...]`; the first error of a rank is raised here, with its traceback."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=_rank, args=(rank, count, folder, work, arguments)) for rank in range(count)]
        for process in processes:
            process.start()
        try:
            _wait(processes, Path(folder), time.monotonic() + timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.join()
        return [pickle.loads((Path(folder) / f"{rank}.done").read_bytes()) for rank in range(count)]


def _wait(processes: list, folder: Path, until: float) -> None:
    while any(process.is_alive() for process in processes):
        failed = sorted(folder.glob("*.failed"), key=lambda path: path.stat().st_mtime_ns)
        assert not failed, f"rank {failed[0].stem}:\n{failed[0].read_text()}"
        assert time.monotonic() < until, f"ranks {[rank for rank, process in enumerate(processes) if process.is_alive()]} hang"
        time.sleep(0.05)
    failed = sorted(folder.glob("*.failed"))
    assert not failed, f"rank {failed[0].stem}:\n{failed[0].read_text()}"
    codes = [process.exitcode for process in processes]
    assert not any(codes), f"exit codes {codes}"


def _rank(rank: int, count: int, folder: str, work: Callable, arguments: tuple) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
        done = work(*arguments)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        partial = Path(folder) / f"{rank}.part"
        partial.write_text(traceback.format_exc())
        partial.rename(Path(folder) / f"{rank}.failed")
        raise SystemExit(1) from None
    (Path(folder) / f"{rank}.done").write_bytes(pickle.dumps(done))
