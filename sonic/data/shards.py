"""Shards of clips: what makes them, the processes that make them, and what each says of itself."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sonic.data.clips import mark_unfinished
from sonic.data.data_config import PrecomputeConfig
from sonic.geometry import FPS
from sonic.system.files import save_tensors
from sonic.system.program import written
from sonic.system.worker import Crashed, Worker

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


class DamagedShard(ValueError):
    """A shard that is cut short, or is none."""


def facts_of(path: Path) -> dict[str, Any]:
    """What a shard says of itself. Raises DamagedShard when it cannot, ValueError when the file cannot be opened."""
    try:
        with safe_open(path, framework="pt") as shard:
            facts = {name: json.loads(value) for name, value in (shard.metadata() or {}).items()}
    except (SafetensorError, ValueError) as error:
        raise DamagedShard(f"{path} is damaged ({error}); delete it and repeat the {written('precompute')} command that made it") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error})") from error
    if not isinstance(facts.get("clips"), list):
        raise DamagedShard(f"{path} is no shard of clips; delete it and repeat the {written('precompute')} command")
    return facts


def whole(path: Path) -> bool:
    """Whether a shard is there. A damaged one is said and removed, so that it is made again."""
    if not path.is_file():
        return False
    try:
        facts_of(path)
    except DamagedShard as error:
        LOG.warning("%s; it is made again", str(error).partition("; ")[0])
        path.unlink()
        return False
    return True


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


def each_made(make: Callable, jobs: Sequence[tuple], workers: int, *, crashed: Callable | None = None) -> Iterator[None]:
    """Call make(*job) for every job, in so many processes of their own (0 = here), in whatever order they are done.

    A job whose process dies of it is given to crashed(*job, error=Crashed), here, and the other jobs go on; without `crashed` the error
    is raised.
    """
    if not workers or not jobs:
        yield from (make(*job) for job in jobs)
        return
    own, begun = threading.local(), []

    def begin() -> None:
        own.worker = Worker(partial(torch.set_num_threads, 1))
        begun.append(own.worker)

    def work(job: tuple) -> None:
        try:
            own.worker.call(make, *job)
        except Crashed as error:
            if crashed is None:
                raise
            crashed(*job, error=error)

    with ThreadPoolExecutor(min(workers, len(jobs)), initializer=begin) as threads:
        futures = [threads.submit(work, job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
            for worker in begun:
                worker.stop()
