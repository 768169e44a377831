"""Shards of clips: what makes them, the processes that make them, and what each says of itself."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from sonic.data.clips import mark_unfinished
from sonic.data.settings import PrecomputeConfig
from sonic.files import save_tensors
from sonic.geometry import FPS

LOG = logging.getLogger(__name__)
MADE_WITH = {"autoencoder_hash": "autoencoders", "speech_hash": "speech encoders", "fps": "frame rates"}  # and what several are called


@dataclass(frozen=True)
class Encoders:
    """What makes training data of sounds and frames; built anew in every worker.

    hear(samples float32 16 kHz [n], F) -> features [N,A,F] at `fps`; autoencoder: reference(picture) and encode(MotionLayers), or
    encode(frames), of the model that the data are for; read(prompt) -> rows [L,D], None where the model reads none; hashes: of the
    weights, by the names that shards have for them. Speech alone needs none of them.
    """

    hear: Callable[[np.ndarray, int], Tensor] | None
    autoencoder: Any
    read: Callable[[str], Tensor] | None = None
    hashes: Mapping[str, str] = field(default_factory=dict)
    fps: int = FPS


Build = Callable[[PrecomputeConfig], Encoders]
HashesOf = Callable[[PrecomputeConfig], Mapping[str, str]]  # the hashes of the encoders that would be built, without building them
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
    save_tensors(tensors, path, {name: json.dumps(value) for name, value in facts.items()})


def facts_of(path: Path) -> dict[str, Any]:
    """What a shard says of itself."""
    with safe_open(path, framework="pt") as shard:
        return {name: json.loads(value) for name, value in (shard.metadata() or {}).items()}


def made_with(told: Sequence[dict[str, Any]], config: PrecomputeConfig) -> dict[str, Any]:
    """What all these shards were made with, as far as they know. Raises ValueError when they were made with several of a kind."""
    found: dict[str, Any] = {"autoencoder": config.model.autoencoder}
    shards = [facts for facts in told if facts["clips"]]
    for name, what in MADE_WITH.items():
        values = {facts[name] for facts in shards if facts.get(name)}
        silent = sum(not facts.get(name) for facts in shards)
        if len(values) > 1:
            raise ValueError(f"folder={config.folder} holds shards of {len(values)} {what}; name another folder=, or empty this one")
        if values and silent:
            LOG.warning("%d older shards in %s carry no %s; delete them to have them made again", silent, config.folder, name)
        if values:
            found[name] = values.pop()
    return found


def outdated(path: Path, hashes: Mapping[str, str]) -> bool:
    """Whether the clips of a shard were made by other encoders than these; one that does not know is taken for up to date."""
    facts = facts_of(path)
    return bool(facts["clips"]) and any(facts.get(name) and value and facts[name] != value for name, value in hashes.items())


def begin_again(count: int, folder: Path) -> None:
    """Say that so many shards are replaced, to the person and to whoever reads the folder meanwhile."""
    if count:
        mark_unfinished(folder)
        LOG.warning("%d shards in %s were made by other encoders than the model has now; they are made again", count, folder)


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
