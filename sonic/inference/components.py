"""The networks that make a video: the transformer, and the autoencoder with the encoders of the model's family; and their device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from sonic.checkpoint.load import NO_LORA, Lora
from sonic.config import LoraConfig, ModelConfig
from sonic.model.dit import AvatarDiT
from sonic.model.lora import lora_alpha, read_lora
from sonic.parallel.context import DistributedContext
from sonic.parallel.vae_rank import RemoteAutoencoder
from sonic.vae.motion_vae import WarpAutoencoder
from sonic.vae.wan_vae import WanAutoencoder

Autoencoder = WarpAutoencoder | WanAutoencoder | RemoteAutoencoder
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class LoadedNetworks(NamedTuple):
    """The transformer and the autoencoder of a rank.

    `model` is None on the rank that only decodes; `autoencoder` is None on ranks that only run the transformer.
    """

    model: AvatarDiT | None
    autoencoder: Autoencoder | None


@dataclass
class Components:
    """All networks that this rank needs to make a video; each family adds its encoders. `load` loads transformer and autoencoder."""

    config: ModelConfig
    context: DistributedContext
    make_autoencoder: Callable[[], Autoencoder]
    make_model: Callable[[], AvatarDiT] | None = None
    dtype: torch.dtype = torch.float32
    weights: str = ""  # the weight files of the transformer, as text for the log
    networks: LoadedNetworks | None = None

    @property
    def device(self) -> torch.device:
        """The device of this rank."""
        return self.context.world.device

    def load(self) -> LoadedNetworks:
        """Load those of the transformer and the autoencoder that this rank needs; a second call returns the same networks."""
        world = self.context.world
        if self.networks is None:
            model = None if world.holds_vae else self.make_model()
            remote = world.vae_rank and world.leads
            decodes = world.leads or world.holds_vae
            autoencoder = RemoteAutoencoder(self.context.vae_channel) if remote else self.make_autoencoder() if decodes else None
            self.networks = LoadedNetworks(model, autoencoder)
        return self.networks

    @property
    def model(self) -> AvatarDiT:
        """The transformer. `load` must have been called."""
        assert self.networks is not None, "load() comes first"
        return self.networks.model

    @property
    def autoencoder(self) -> Autoencoder:
        """The autoencoder, or the proxy for the one on another rank. `load` must have been called."""
        assert self.networks is not None, "load() comes first"
        return self.networks.autoencoder

    def with_model(self, model: AvatarDiT) -> Components:
        """A copy whose `load` uses this transformer instead of loading one."""
        return replace(self, make_model=lambda: model, networks=None)


def lora_of(config: LoraConfig, student: Path | None = None) -> Lora:
    """The adapters to merge: those of the config, else the student's, else none."""
    path = config.path or student
    return Lora(read_lora(path), config.alpha or lora_alpha(path)) if path else NO_LORA


def find_device(name: str, local_rank: int | None = None) -> torch.device:
    """The torch device for auto, cpu, cuda or cuda:N; with `local_rank`, cuda is spread over the GPUs of the machine.

    Raises ValueError for cuda on a machine without a usable GPU.
    """
    if name == "auto":
        return find_device("cuda" if torch.cuda.is_available() else "cpu", local_rank)
    if name == "cuda" and local_rank is not None and torch.cuda.is_available():
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"run.device={name}: this machine has no CUDA device that torch can use; use run.device=cpu")
    return torch.device(name)
