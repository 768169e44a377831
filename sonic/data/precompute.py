"""Makes data sets of clips in worker processes: synthesised speech, its features, and latents of drawn people who say it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sonic.data import clips
from sonic.data.audio import log_mel
from sonic.data.data_config import PrecomputeConfig
from sonic.data.own_videos import precompute_videos
from sonic.data.pixels import signed
from sonic.data.shards import Build, Encoders, HashesOf, common_encoders, encoders_here, make_shards, write_shard
from sonic.geometry import FPS, FRAMES_PER_LATENT
from sonic.registry import Registry
from sonic.synthetic import draw_face, voices
from sonic.synthetic.drawn_people import motion_targets
from sonic.system.files import save_tensors
from sonic.types import MotionLayers

LOG = logging.getLogger(__name__)
PER_SHARD = 16  # utterances; a killed run loses at most so many per worker


def precompute(config: PrecomputeConfig, build: Build, hashes_of: HashesOf = lambda config: {}) -> int:
    """Make the shards that are missing or were made by other encoders, then the index and the statistics. Returns the number of clips.

    `build` must be a function that worker processes can import. Shard n depends on the seed, the encoders and n alone: any number of
    workers makes the same data, and a run that was stopped continues. Raises ValueError when the folder holds clips of another kind.
    """
    folder = Path(config.folder)
    if config.data.source:
        clips.check_same_settings(folder, kind=config.kind, source=config.data.source)
        return precompute_videos(config, build, hashes_of(config))
    settings = {name: getattr(config, name) for name in ("kind", "seed", "split", "latent_frames", "clips_per_utterance")}
    clips.check_same_settings(folder, source="", mix=asdict(config.mix), **settings)
    jobs = {_shard_name(number): number for number in range(-(-config.utterances // PER_SHARD))}
    make, complete = partial(_write_shard, config, build), partial(_complete, config)
    shards = make_shards(config, jobs, make, complete=complete, hashes=hashes_of(config))
    entries = [entry for metadata in shards for entry in metadata["clips"]]
    clips.write_index(folder, entries, mix=asdict(config.mix), **settings, **common_encoders(shards, config))
    if config.kind == "talking":
        save_tensors(clips.latent_statistics(folder), folder / clips.STATISTICS)
    LOG.info("%d clips in %s", len(entries), folder)
    return len(entries)


def talking(config: PrecomputeConfig, encoders: Encoders, rng: np.random.Generator) -> Iterator[dict[str, Tensor]]:
    """Clips of one recording, each spoken by a different drawn person: latents, ref, audio, visemes, head."""
    samples, spoken = recording(config, rng)
    features = encoders.encode_audio(samples, len(spoken)).half()
    length = FRAMES_PER_LATENT * config.latent_frames
    for start in range(0, config.clips_per_utterance * length, length):
        visemes = spoken[start : start + length]
        head = torch.zeros(length, 4)
        if rng.random() < config.mix.moving:
            head = draw_face.head_motion(rng, length, float(rng.uniform(0.5, 1.5)))
        person = draw_face.draw_identity(rng, config.model.resolution, split=config.split)
        latents, ref = encode_person(encoders.autoencoder, person, visemes=visemes, head=head)
        audio = features[:, :, start : start + length].contiguous()
        yield {"latents": latents.half(), "ref": ref.half(), "audio": audio, "visemes": visemes.contiguous(), "head": head}


def spoken(config: PrecomputeConfig, encoders: Encoders, rng: np.random.Generator) -> Iterator[dict[str, Tensor]]:
    """One recording as a single clip: log-mel columns [2F,40] and visemes [F,5]."""
    samples, visemes = recording(config, rng)
    yield {"mel": torch.from_numpy(log_mel(samples, len(visemes))).half(), "visemes": visemes}


def recording(config: PrecomputeConfig, rng: np.random.Generator) -> tuple[np.ndarray, Tensor]:
    """Synthesise one recording, as long as all its clips: samples at 16 kHz, and the visemes [F,5] of the speech."""
    frames = FRAMES_PER_LATENT * config.latent_frames * config.clips_per_utterance
    utterance = voices.say(rng, split=config.split, seconds=frames / FPS)
    visemes = torch.from_numpy(voices.viseme_track(utterance, frames))
    samples = utterance.samples
    if rng.random() < config.mix.silent:  # no speech: the mouth stays at rest, whether or not there is noise
        samples, visemes = np.zeros_like(samples), torch.zeros_like(visemes)
    if rng.random() >= config.mix.clean:
        samples = voices.augment(samples, rng)
    return samples, visemes


MAKERS: Registry[Callable] = Registry("kind", {"talking": talking, "spoken": spoken})


@torch.no_grad()
def encode_person(autoencoder: Any, person: draw_face.Identity, *, visemes: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    """Encode a drawn person speaking, latents [C,T,h,w], and at rest, [C,1,h,w]."""
    picture = signed(person.picture)
    reference = autoencoder.reference(picture)
    still = not head.any()
    parts = []
    for shapes, pose in zip(visemes.split(8), head.split(8), strict=True):  # small enough for the CPU cache
        motion = motion_targets(person.mouth, shapes, None if still else pose, resolution=person.picture.shape[0])
        parts.append(autoencoder.encode(MotionLayers(**{name: value.unsqueeze(0) for name, value in motion.items()}))[0])
    return torch.cat(parts, 1), reference.latents[0]


def _write_shard(config: PrecomputeConfig, build: Build, number: int) -> None:
    """Write shard `number` atomically."""
    encoders, tensors, entries = encoders_here(config, build), {}, []
    for recording_number in _recordings(config, number):
        rng = np.random.default_rng((config.seed, recording_number))
        for clip in MAKERS[config.kind](config, encoders, rng):
            name = f"{recording_number:06d}_{len(entries):04d}"
            frames = clip["visemes"].shape[0] // FRAMES_PER_LATENT
            entries.append({"name": name, "shard": _shard_name(number), "latent_frames": frames, "tensors": sorted(clip)})
            tensors |= {f"{name}/{key}": value.contiguous() for key, value in clip.items()}
    write_shard(Path(config.folder) / _shard_name(number), tensors, clips=entries, fps=FPS, **encoders.hashes)


def _recordings(config: PrecomputeConfig, number: int) -> range:
    """Numbers of the recordings in shard `number`; the last shard may have fewer than the others."""
    return range(number * PER_SHARD, min((number + 1) * PER_SHARD, config.utterances))


def _complete(config: PrecomputeConfig, number: int, metadata: Mapping[str, Any]) -> bool:
    """Whether shard `number` has all its recordings; a last shard may lack those that `utterances` has been raised by."""
    return len({clip["name"].partition("_")[0] for clip in metadata["clips"]}) == len(_recordings(config, number))


def _shard_name(number: int) -> str:
    return f"shard_{number:05d}.safetensors"
