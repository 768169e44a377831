"""The composition root: a config becomes the parts of the main job, with their weights, on their device."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from sonic import assets
from sonic.checkpoint.ready import Ready
from sonic.config import LoraConfig, ModelConfig, RunConfig
from sonic.model.dit import AvatarDiT
from sonic.model.lora import lora_alpha, merge_lora, read_lora
from sonic.model.speech_encoder import SPEECH_ENCODERS
from sonic.model.vae import WarpAutoencoder
from sonic.model.wan_vae import WanAutoencoder
from sonic.model.weights import load_weights
from sonic.types import pick

log = logging.getLogger("sonic.infer")

AUTOENCODERS: Mapping[str, Callable[[], nn.Module]] = {"warp": WarpAutoencoder}
BUNDLED = Path(assets.__file__).parent
STUDENT, TEACHER = "student", "teacher"  # what model.weights may say instead of a place: bundled weights with adapters or without
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Parts:
    """What the main job runs on; speech.hear turns (16 kHz samples, number of video frames) into features [N,A,F]."""

    config: ModelConfig
    model: AvatarDiT
    autoencoder: nn.Module
    speech: nn.Module
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the transformer."""
        return next(self.model.parameters()).dtype


@dataclass(frozen=True)
class ReadyParts:
    """What a painted film runs on, out of a ready checkpoint: encoders come and go, transformer and VAE come when they are asked for."""

    config: ModelConfig
    checkpoint: Ready
    device: torch.device
    dtype: torch.dtype

    @cached_property
    def model(self) -> AvatarDiT:
        """The transformer, with the adapter of model.lora merged."""
        model = self.checkpoint.transformer(self.config, device=self.device, dtype=self.dtype)
        if self.config.lora.path:
            _add_lora(model, self.config.lora, self.config.lora.path)
        return model

    @cached_property
    def autoencoder(self) -> WanAutoencoder:
        """The Wan VAE."""
        return self.checkpoint.autoencoder(self.device)


def build_parts(config: ModelConfig, run: RunConfig, *, steps: int) -> Parts | ReadyParts:
    """Model, autoencoder and speech encoder as configured, with weights for so many sampling steps, ready to run.

    Raises ValueError when weights are missing, damaged or of another shape, or the machine has no such device.
    """
    if run.threads:
        torch.set_num_threads(run.threads)
    device = find_device(run.device)
    if config.autoencoder == "wan":
        checkpoint = Ready.open(Path(_needed(config)))
        return ReadyParts(checkpoint.config(config), checkpoint, device, pick(DTYPES, run.dtype, "run.dtype"))
    files = weight_files(config)
    parts = untrained_parts(config, device=device, dtype=pick(DTYPES, run.dtype, "run.dtype"))
    load_weights(parts.model, files.dit)
    if lora := config.lora.path or student_of(config, steps):
        _add_lora(parts.model, config.lora, lora)
    load_weights(parts.autoencoder, files.autoencoder)
    load_weights(parts.speech, files.speech)
    return parts


def _add_lora(model: AvatarDiT, config: LoraConfig, path: str | Path) -> None:
    merge_lora(model, read_lora(path), config.alpha or lora_alpha(path))


def untrained_parts(config: ModelConfig, *, device: torch.device, dtype: torch.dtype = torch.float32) -> Parts:
    """The same parts before any weights are loaded."""
    still = lambda module: module.to(device).eval().requires_grad_(False)  # noqa: E731
    return Parts(
        config,
        model=still(AvatarDiT(config)).to(dtype),
        autoencoder=still(pick(AUTOENCODERS, config.autoencoder, "model.autoencoder")()),
        speech=still(pick(SPEECH_ENCODERS, config.speech_encoder, "model.speech_encoder")()),
        device=device,
    )


class WeightFiles(NamedTuple):
    """Where the weights of each part lie."""

    dit: Path
    autoencoder: Path
    speech: Path


def weight_files(config: ModelConfig) -> WeightFiles:
    """Files of all parts: bundled, in the folder model.weights, or that of the transformer alone named by it."""
    bundled, named = (WeightFiles(*(folder / f"{config.name}_{part}.safetensors" for part in WeightFiles._fields))
                      for folder in (BUNDLED, Path(config.weights)))  # fmt: skip
    if config.weights in ("", STUDENT, TEACHER):
        return bundled
    if Path(config.weights).is_file():
        return bundled._replace(dit=Path(config.weights))
    if not Path(config.weights).is_dir():
        names = ", ".join(file.name for file in named)
        raise ValueError(f"model.weights={config.weights} does not exist; name a folder with {names}, or leave it out")
    return named


def student_of(config: ModelConfig, steps: int) -> Path | None:
    """Bundled adapters that were distilled for so many sampling steps; None without them, or when others are asked for.

    model.weights=student takes those for fewer steps where there are none. Raises ValueError when there are none of these either.
    """
    if config.weights not in ("", STUDENT) or config.lora.path:
        return None
    start, end = f"{config.name}_", "step"
    there = {int(path.stem.removeprefix(start).removesuffix(end)): path for path in BUNDLED.glob(f"{start}*{end}.safetensors")}
    if config.weights == "" or steps in there:
        return there.get(steps)
    if fewer := [number for number in there if number < steps]:
        return there[max(fewer)]
    raise ValueError(
        f"model.weights={STUDENT}: nobody bundled has learnt model={config.name} in sampler.sample_steps={steps}; "
        f"use {f'sampler.sample_steps={min(there)} or more' if there else 'another model'}, or weights={TEACHER}"
    )


def find_device(name: str) -> torch.device:
    """The device called auto, cpu, cuda or cuda:N."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"run.device={name}: this machine has no CUDA device that torch can use; use run.device=cpu")
    return torch.device(name)


def transformer_weights(config: ModelConfig) -> Path:
    """The file or folder of the transformer alone. Raises ValueError when it is for another model, or there is none."""
    if config.autoencoder != "wan":
        return weight_files(config).dit
    checkpoint = Ready.open(Path(_needed(config)))
    checkpoint.config(config)
    return checkpoint.folder / "dit"


def _needed(config: ModelConfig) -> str:
    """The checkpoint of a model that has no bundled weights."""
    if not config.weights:
        raise ValueError(
            f"model={config.name} has no bundled weights: it needs checkpoint=FOLDER, made by launch/convert.py of the published "
            "Wan2.2-S2V-14B (for live_avatar_14b also LiveAvatar); model=preview needs nothing"
        )
    return config.weights
