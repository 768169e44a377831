"""Clips on disk: safetensors shards with an index, the dataset that cuts windows from them, and the seeded order of batches."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange, repeat
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sonic.config import ModelConfig
from sonic.data.audio import COLUMNS_PER_FRAME
from sonic.geometry import FRAMES_PER_LATENT
from sonic.system.files import written_temporary
from sonic.system.program import written
from sonic.system.stdio import ignore_signals

LOG = logging.getLogger(__name__)
ENCODERS = {"autoencoder_hash": "autoencoder", "speech_hash": "speech encoder"}  # key of the metadata: what it is a hash of
INDEX, STATISTICS = "index.json", "statistics.safetensors"
UNFINISHED = "unfinished"  # key of an index whose clips are being made again
# tensors with a time axis: (axis, entries per latent frame); all others are read whole
TIME = {
    "latents": (1, 1),
    "audio": (2, FRAMES_PER_LATENT),
    "mel": (0, COLUMNS_PER_FRAME * FRAMES_PER_LATENT),
    "visemes": (0, FRAMES_PER_LATENT),
    "head": (0, FRAMES_PER_LATENT),
    **dict.fromkeys(("token_ticks", "bucket_ticks", "buckets"), (0, 1)),  # of a model whose latents are single frames
}


def write_index(folder: Path, clips: list[dict], **metadata: object) -> None:
    """Write the index of `folder`: every clip, and the `metadata` that all clips share."""
    with written_temporary(folder / INDEX) as file:
        file.write_text(json.dumps({**metadata, "clips": clips}))


def mark_unfinished(folder: Path) -> None:
    """Mark the index, if there is one, as unfinished while its clips are made again; the next `write_index` removes the mark."""
    if (folder / INDEX).is_file():
        write_index(folder, **read_index(folder) | {UNFINISHED: True})


def read_index(folder: Path) -> dict:
    """Read the index of a folder of clips. Raises ValueError when there is none or it is damaged."""
    path = Path(folder) / INDEX
    if not path.is_file():
        raise ValueError(f"data.folder={folder} holds no {INDEX}: make clips with {written('precompute')} or name another folder")
    try:
        index = json.loads(path.read_text())
        if not isinstance(index["clips"], list):
            raise TypeError("its clips are no list")
    except (ValueError, KeyError, TypeError) as error:
        again = f"repeat the {written('precompute')} command that made it"
        raise ValueError(f"{path} is damaged ({error}); delete it and {again}") from error
    return index


def check_same_settings(folder: Path, **metadata: object) -> None:
    """Raise ValueError when the folder already holds clips with other metadata; keys that its index lacks are not compared."""
    if not (folder / INDEX).is_file():
        return
    known = read_index(folder)
    for name, value in metadata.items():
        if known.get(name, value) != value:
            was = f"{name}={known[name]}" if known[name] else f"no {name}"
            raise ValueError(f"folder={folder} holds clips made with {was}, not {name}={value}; name another folder=")


class ClipDataset(Dataset):
    """Windows of clips. The key of an item is (index of the clip, seed of the window's position).

    Items are mappings of tensors: latents [C,T,h,w], ref [C,1,h,w], audio [K,E,4T], visemes [4T,5], head [4T,4], those that
    the clips have; of models that denoise windows, image_latents [C,h,w], image_embed [D], face_mask [8h,8w], buckets [T,2], and the states
    of the sound around each frame, token_ticks [T,10,K,E] and bucket_ticks [T,50,E]. Only the window is read from disk. Raises ValueError
    when no clip is that long, or the data set is being made again.
    """

    def __init__(self, folder: str | Path, window: int = 0, *, share: float = 0.0, held_out: bool = False) -> None:
        """The clips of videos that are not held out with that share, or those that are."""
        self.folder, self.window = Path(folder), window
        self.index = read_index(self.folder)
        if self.index.get(UNFINISHED):
            raise ValueError(f"data.folder={folder} holds clips of two encoders, half made again; finish {written('precompute')}")
        long_enough = [clip for clip in self.index["clips"] if clip["latent_frames"] >= window]
        if not long_enough:
            raise ValueError(f"data.window={window} latent frames is longer than every clip in {folder}; use a smaller window")
        taken = [is_held_out(clip, share) for clip in long_enough]
        taken = [False] * len(taken) if all(taken) else taken  # training always keeps some
        self.clips = [clip for clip, out in zip(long_enough, taken, strict=True) if out == held_out]

    def has(self, name: str) -> bool:
        """Whether every clip has a tensor of that name."""
        return all(name in clip["tensors"] for clip in self.clips)

    def check(self, config: ModelConfig, hashes_of: Callable[[ModelConfig], Mapping[str, str]] = lambda config: {}) -> None:
        """Raise ValueError when clips with latents were made for another model, at another frame rate, or by encoders of other weights
        than `hashes_of` gives ("" = unknown). Values that the index lacks are assumed to fit, with a warning."""
        made_by, rate = self.index.get("family", config.family), config.rollout.fps
        if "latents" not in self.clips[0]["tensors"]:
            return
        if made_by != config.family:
            raise ValueError(
                f"data.folder={self.folder} holds latents of the family {made_by}, model={config.name} needs those of "
                f"{config.family}; make clips for this model with {written('precompute')}"
            )
        if self.index.get("fps", rate) != rate:
            raise ValueError(
                f"data.folder={self.folder} holds clips of {self.index['fps']} frames a second, model={config.name} makes {rate}; "
                f"make clips for this model with {written('precompute')} and another folder="
            )
        self._check_encoders(config, hashes_of)
        if not self.has("audio"):
            return
        clip = self.read(0, 0, keys=("latents", "audio"))
        sizes = (clip["latents"].shape[0], *clip["audio"].shape[:2])
        needed = (config.trunk.latent_channels, config.audio.num_audio_layers, config.audio.audio_dim)
        if sizes != needed:
            raise ValueError(
                f"data.folder={self.folder} has (latent channels, audio layers, audio values) {sizes}, model={config.name} needs {needed}; "
                f"make clips for this model with {written('precompute')}"
            )

    def _check_encoders(self, config: ModelConfig, hashes_of: Callable[[ModelConfig], Mapping[str, str]]) -> None:
        current = hashes_of(config) if any(self.index.get(name) for name in ENCODERS) else {}
        for name, what in ENCODERS.items():
            known, ours = self.index.get(name, ""), current.get(name, "")
            if known and ours and known != ours:
                raise ValueError(
                    f"data.folder={self.folder} holds clips of another {what} (weights {known}) than model={config.name} has "
                    f"(weights {ours}); make the clips again (the {written('precompute')} command that made them does it in place), or "
                    "name the folder that fits"
                )
        silent = ", ".join(name for name in (*ENCODERS, "fps") if not self.index.get(name))
        if silent:
            LOG.warning("data.folder=%s does not say what its clips were made with (%s); they are taken to fit", self.folder, silent)

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, draw: tuple[int, int]) -> dict[str, Tensor]:
        return self.read(*draw)

    def read(self, index: int, seed: int, keys: tuple[str, ...] = ()) -> dict[str, Tensor]:
        """Read one window of the tensors `keys` (empty = all that the clip has)."""
        clip = self.clips[index]
        length = self.window or clip["latent_frames"]
        start = int(np.random.default_rng(seed).integers(clip["latent_frames"] - length + 1))
        with _opened(self.folder / clip["shard"]) as shard:
            stored = {key: shard.get_slice(f"{clip['name']}/{key}") for key in keys or clip["tensors"]}
            return {key: tensor[_window(key, start, length)].float() for key, tensor in stored.items()}

    def statistics(self) -> dict[str, Tensor]:
        """Standard deviations of the training latents (`cell_std` [h,w], `channel_std` [C]); {} when the folder has none."""
        path = self.folder / STATISTICS
        if not path.is_file():
            return {}
        with _opened(path) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def is_held_out(clip: Mapping[str, Any], share: float) -> bool:
    """Whether a clip belongs to that share of the videos: by a hash of the video's name, so that all clips of a video go together and
    other videos change nothing. Clips that do not name their video go by their shard, which is of one video."""
    digest = hashlib.sha256(str(clip.get("video", clip["shard"])).encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """An open safetensors file. Raises ValueError when it is damaged or missing."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or gone ({error}); repeat the {written('precompute')} command that made it") from error


def _window(key: str, start: int, length: int) -> tuple[slice, ...]:
    """The part of a tensor in a window of latent frames; all of it when it has no time axis."""
    if key not in TIME:
        return (slice(None),)
    axis, rate = TIME[key]
    return (*[slice(None)] * axis, slice(start * rate, (start + length) * rate))


def latent_statistics(folder: Path, most: int = 400) -> dict[str, Tensor]:
    """Root mean square of the latents (zero = no motion) over up to `most` clips: per cell [h,w] and per channel [C]."""
    data = ClipDataset(folder)
    chosen = np.linspace(0, len(data) - 1, min(most, len(data))).astype(int)
    squares = sum(data.read(int(i), 0, keys=("latents",))["latents"].square().mean(1) for i in chosen) / len(chosen)
    return {"cell_std": squares.mean(0).sqrt(), "channel_std": squares.mean((1, 2)).sqrt()}


def pose_latents(head: Tensor, height: int, width: int) -> Tensor:
    """Head motion as pose latents: value j of frame f of a latent frame fills channel 4j+f.  [...,4T,4] -> [...,16,T,h,w]"""
    packed = rearrange(head, "... (t f) j -> ... (j f) t", f=FRAMES_PER_LATENT)
    return repeat(packed, "... c t -> ... c t h w", h=height, w=width)


def sample_order(length: int, batch: int, *, seed: int, start: int = 0, rank: int = 0, ranks: int = 1) -> Iterator[list[tuple[int, int]]]:
    """Endless batches of (index, seed): every epoch is a new permutation, and ranks take batches in turn.

    `start` is the number of batches that all ranks together have used already, a multiple of `ranks`.
    """
    position = start * batch
    order, epoch = np.empty(0, np.int64), -1
    while True:
        chosen = []
        for draw in range(position + rank * batch, position + (rank + 1) * batch):
            if draw // length != epoch:
                epoch = draw // length
                order = np.random.default_rng((seed, epoch)).permutation(length)
            words = np.random.SeedSequence((seed, 1, draw)).generate_state(1, np.uint64)
            chosen.append((int(order[draw % length]), int(words[0] >> 1)))
        position += batch * ranks
        yield chosen


def batches(dataset: Dataset, order: Callable[[], Iterator[list]], *, workers: int = 0, prefetch: int = 4) -> Iterator[dict[str, Tensor]]:
    """Batches of a dataset in an endless order (see `sample_order`), loaded by `workers` processes (0 = this one).

    A dataset whose items hold more than tensors has its own `collate`.
    """
    extra = {"num_workers": workers, "prefetch_factor": prefetch, "multiprocessing_context": "spawn"} if workers else {}
    collate = getattr(dataset, "collate", None)
    return iter(DataLoader(dataset, batch_sampler=order(), collate_fn=collate, worker_init_fn=_start_worker, **extra))


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)
    ignore_signals()  # a training that ends its step on a signal needs its batches
