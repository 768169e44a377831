"""Shards of clips: the encoders and worker processes that make them, and the metadata of each."""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from sonic.data.clips import ENCODERS, mark_unfinished
from sonic.data.data_config import PrecomputeConfig
from sonic.data.segments import Framing, Segment
from sonic.geometry import FPS
from sonic.system.files import save_tensors
from sonic.system.program import written
from sonic.system.worker import Crashed, Worker

LOG = logging.getLogger(__name__)


def features_of(features: Tensor, segment: Segment) -> dict[str, Tensor]:
    """The features of the sound of a segment, zeros after the end of the sound.  [K,E,F of the video] -> audio [K,E,F]"""
    audio = features[..., segment.first : segment.first + segment.frames]
    return {"audio": F.pad(audio, (0, segment.frames - audio.shape[-1]))}


@dataclass(frozen=True)
class Encoders:
    """The encoders that turn sound, frames and prompts into training data; built once in every worker.

    encode_audio(samples float32 16 kHz [n], F) -> features [K,E,F] at `fps`; autoencoder: reference(picture) and encode(MotionLayers)
    or encode(frames), depending on the model; read(prompt) -> text features [L,E], None for a model without prompts; hashes of the
    weights by metadata key; `frame`, `encode` and `audio_of` give the frames of a segment of a video, the tensors of its clip, and those
    of its sound, from the features of the whole recording. Data of kind "spoken" need none of them.
    """

    encode_audio: Callable[[np.ndarray, int], Tensor] | None
    autoencoder: Any
    read: Callable[[str], Tensor] | None = None
    hashes: Mapping[str, str] = field(default_factory=dict)
    fps: int = FPS
    frame: Framing | None = None
    encode: Callable[[Segment], dict[str, Tensor]] | None = None
    audio_of: Callable[[Tensor, Segment], dict[str, Tensor]] = features_of


Build = Callable[[PrecomputeConfig], Encoders]
HashesOf = Callable[[PrecomputeConfig], Mapping[str, str]]  # hashes of the encoders' weights, without building the encoders
_BUILT: dict[str, Encoders] = {}


def encoders_here(config: PrecomputeConfig, build: Build) -> Encoders:
    """The encoders of this process, built at the first call."""
    key = repr((config, build))
    if key not in _BUILT:
        _BUILT.clear()
        _BUILT[key] = build(config)
    return _BUILT[key]


def write_shard(path: Path, tensors: dict[str, Tensor], **metadata: object) -> None:
    """Write a shard atomically, with its metadata as JSON."""
    save_tensors(tensors, path, {name: json.dumps(value) for name, value in metadata.items()})


class DamagedShard(ValueError):
    """Raised for a file that is cut short or is no shard."""


def read_metadata(path: Path) -> dict[str, Any]:
    """Read the metadata of a shard. Raises DamagedShard when the file is damaged, ValueError when it cannot be opened."""
    try:
        with safe_open(path, framework="pt") as shard:
            metadata = {name: json.loads(value) for name, value in (shard.metadata() or {}).items()}
    except (SafetensorError, ValueError) as error:
        raise DamagedShard(f"{path} is damaged ({error}); delete it and repeat the {written('precompute')} command that made it") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error})") from error
    if not isinstance(metadata.get("clips"), list):
        raise DamagedShard(f"{path} is no shard of clips; delete it and repeat the {written('precompute')} command")
    return metadata


def make_shards(
    config: PrecomputeConfig,
    jobs: Mapping[str, Any],
    make: Callable[[Any], None],
    *,
    complete: Callable[[Any, dict[str, Any]], bool],
    hashes: Mapping[str, str],
    crashed: Callable | None = None,
) -> list[dict[str, Any]]:
    """Make the shards that are missing, damaged, not `complete(job, metadata)`, or of encoders of other hashes, each by make(job).

    `jobs` has one job for each shard's file name; `crashed` is for `run_in_workers`. Gives the metadata of all shards, in their order.
    """
    folder = Path(config.folder)
    folder.mkdir(parents=True, exist_ok=True)
    known = {name: metadata for name in jobs if (metadata := _intact(folder / name)) is not None}
    known = {name: metadata for name, metadata in known.items() if complete(jobs[name], metadata)}
    old = [name for name, metadata in known.items() if _outdated(metadata, hashes)]
    if old:
        mark_unfinished(folder)
        LOG.warning("%d shards in %s were made by other encoders than the model has now; they are made again", len(old), folder)
    missing = [job for name, job in jobs.items() if name in old or name not in known]
    done = run_in_workers(make, missing, config.workers, crashed=crashed)
    for _ in tqdm(done, total=len(jobs), initial=len(jobs) - len(missing), unit="shard", desc=folder.name):
        pass
    return [read_metadata(folder / name) for name in jobs]


def _intact(path: Path) -> dict[str, Any] | None:
    """The metadata of a shard; None when there is none. A damaged one is reported and removed, so that it is made again."""
    if not path.is_file():
        return None
    try:
        return read_metadata(path)
    except DamagedShard as error:
        LOG.warning("%s; it is made again", str(error).partition("; ")[0])
        path.unlink()
        return None


def _outdated(metadata: Mapping[str, Any], hashes: Mapping[str, str]) -> bool:
    """Whether the clips of a shard were made by other encoders; a shard without hashes counts as up to date."""
    return bool(metadata["clips"]) and any(metadata.get(name) and value and metadata[name] != value for name, value in hashes.items())


def common_encoders(shard_metadata: Sequence[dict[str, Any]], config: PrecomputeConfig) -> dict[str, Any]:
    """The encoders and frame rate of all these shards, as far as recorded. Raises ValueError when the shards differ in them."""
    common: dict[str, Any] = {"family": config.model.family}
    shards = [metadata for metadata in shard_metadata if metadata["clips"]]
    for name, what in (ENCODERS | {"fps": "frame rate"}).items():
        values = {metadata[name] for metadata in shards if metadata.get(name)}
        silent = sum(not metadata.get(name) for metadata in shards)
        if len(values) > 1:
            raise ValueError(f"folder={config.folder} holds shards of {len(values)} {what}s; name another folder=, or empty this one")
        if values and silent:
            LOG.warning("%d older shards in %s carry no %s; delete them to have them made again", silent, config.folder, name)
        if values:
            common[name] = values.pop()
    return common


def _begin_worker(gpu: int | None) -> None:
    """Prepare a worker process: one thread, and its GPU where the machine has any."""
    torch.set_num_threads(1)
    if gpu is not None:
        torch.cuda.set_device(gpu)


def run_in_workers(make: Callable[[Any], None], jobs: Sequence[Any], workers: int, *, crashed: Callable | None = None) -> Iterator[None]:
    """Call make(job) for every job in `workers` processes (see PrecomputeConfig); yields None as each job ends, in any order.

    When a job kills its process, crashed(job, error=Crashed) is called in this process and the other jobs go on; without `crashed`
    the error is raised.
    """
    if not workers or not jobs:
        yield from map(make, jobs)
        return
    gpus = torch.cuda.device_count()
    count = (gpus or 2) if workers == -1 else workers
    started = [Worker(partial(_begin_worker, index % gpus if gpus else None)) for index in range(min(count, len(jobs)))]
    idle = deque(started)

    def work(job: Any) -> None:
        worker = idle.pop()
        try:
            worker.call(make, job)
        except Crashed as error:
            if crashed is None:
                raise
            crashed(job, error=error)
        finally:
            idle.append(worker)

    with ThreadPoolExecutor(len(started)) as threads:
        futures = [threads.submit(work, job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
            for worker in started:
                worker.stop()
