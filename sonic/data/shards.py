"""Shards of clips: what makes them, the processes that make them, and what each says of itself."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sonic.data.settings import PrecomputeConfig
from sonic.geometry import FPS


@dataclass(frozen=True)
class Encoders:
    """What makes training data of sounds and frames; built anew in every worker.

    hear(samples float32 16 kHz [n], F) -> features [N,A,F] at `fps`; autoencoder: reference(picture) and encode(MotionLayers), or
    encode(frames), of the model that the data are for, and the hash of its weights; read(prompt) -> rows [L,D], None where the
    model reads none. Speech alone needs none of them.
    """

    hear: Callable[[np.ndarray, int], Tensor] | None
    autoencoder: Any
    read: Callable[[str], Tensor] | None = None
    autoencoder_hash: str = ""
    fps: int = FPS


Build = Callable[[PrecomputeConfig], Encoders]
_BUILT: dict[str, Encoders] = {}


def built(config: PrecomputeConfig, build: Build) -> Encoders:
    """The encoders of this process, built once."""
    wanted = repr((config, build))
    if wanted not in _BUILT:
        _BUILT.clear()
        _BUILT[wanted] = build(config)
    return _BUILT[wanted]


def write_shard(path: Path, tensors: dict[str, Tensor], **facts: object) -> None:
    """A shard that appears whole or not at all, with what it says of itself."""
    aside = path.with_name(f".{os.getpid()}_{path.name}")
    try:
        save_file(tensors, aside, metadata={name: json.dumps(value) for name, value in facts.items()})
        aside.rename(path)
    finally:
        aside.unlink(missing_ok=True)


def facts_of(path: Path) -> dict[str, Any]:
    """What a shard says of itself."""
    with safe_open(path, framework="pt") as shard:
        return {name: json.loads(value) for name, value in (shard.metadata() or {}).items()}


def made_with(told: Sequence[dict[str, Any]], config: PrecomputeConfig) -> dict[str, str]:
    """The autoencoder that all these shards were made with. Raises ValueError when they were made with several."""
    hashes = {facts["autoencoder_hash"] for facts in told if facts.get("autoencoder_hash")}
    if len(hashes) > 1:
        raise ValueError(f"folder={config.folder} holds shards of {len(hashes)} autoencoders; name another folder=, or empty this one")
    return {"autoencoder": config.model.autoencoder, "autoencoder_hash": next(iter(hashes), "")}


def each_made(make: Callable, jobs: Sequence[tuple], workers: int) -> Iterator[None]:
    """Call make(*job) for every job, in so many processes of their own (0 = here), in whatever order they are done."""
    if not workers or not jobs:
        yield from (make(*job) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        futures = [pool.submit(make, *job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _start_worker() -> None:
    """One thread a worker, and none outlives the process that it works for, however that one ends."""
    torch.set_num_threads(1)
    boss = multiprocessing.parent_process()
    threading.Thread(target=lambda: (boss.join(), os._exit(1)), daemon=True).start()
