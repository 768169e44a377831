"""The networks that make a video: the transformer, and the autoencoder with the encoders of the model's family; and their device."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import nn

from sonic.checkpoint.lora import NO_LORA, Lora, read_lora
from sonic.config import PRECISIONS, LoraConfig, ModelConfig
from sonic.model.compile import compile_folder, missing_compiler
from sonic.parallel.context import DistributedContext
from sonic.parallel.mesh import World
from sonic.parallel.vae_rank import RemoteAutoencoder
from sonic.system.nvidia import driver_version

log = logging.getLogger("sonic.inference")
COMPILE_FROM_S = 60.0  # seconds of the shortest video that run.compile=auto compiles for when it is the first
DTYPES = {name: getattr(torch, name) for name in PRECISIONS}
DRIVERS = {"12": "525", "13": "580"}  # the oldest driver for a CUDA version


@dataclass
class Components:
    """All networks that this rank needs to make a video; each family adds its encoders. `load` loads transformer and autoencoder."""

    config: ModelConfig
    context: DistributedContext
    make_autoencoder: Callable[[], nn.Module | RemoteAutoencoder]
    make_model: Callable[[], nn.Module] | None = None
    dtype: torch.dtype = torch.float32
    weights: str = ""  # the weight files of the transformer, as text for the log
    compile: str = "false"  # run.compile
    videos: int = 0  # begun so far
    model: nn.Module | None = None  # after `load`; stays None on the rank that only decodes
    autoencoder: nn.Module | RemoteAutoencoder | None = None  # after `load`: its own or another rank's; None where none decodes

    @property
    def device(self) -> torch.device:
        """The device of this rank."""
        return self.context.world.device

    def load(self) -> None:
        """Load those of the transformer and the autoencoder that this rank needs, unless they are loaded."""
        world = self.context.world
        if self.model is not None or self.autoencoder is not None:
            return
        if not world.holds_vae:
            self.model = self.make_model()
        if world.vae_rank and world.leads:
            self.autoencoder = RemoteAutoencoder(self.context.vae_channel)
        elif world.leads or world.holds_vae:
            self.autoencoder = self.make_autoencoder()

    def begin_video(self, seconds: float) -> None:
        """Load what is not loaded, and decide by run.compile whether the transformer runs compiled in this video (0 = unknown length)."""
        self.load()
        self.videos += 1
        pays = self.device.type == "cuda" and (self.videos > 1 or seconds > COMPILE_FROM_S)
        wanted = self.compile == "true" or (self.compile == "auto" and pays)
        if wanted and not self.model.compiled and (fault := compile_fault(self.context.world)):
            log.warning("run.compile=%s: %s; the transformer runs as it is", self.compile, fault)
            self.compile = "false"
        elif wanted and not self.model.compiled:
            log.info("the transformer is compiled when it first runs; torch keeps what it compiles in %s", compile_folder())
            self.model.compiled = True

    def with_model(self, model: nn.Module) -> Components:
        """A copy whose `load` uses this transformer instead of loading one."""
        return replace(self, make_model=lambda: model, model=None, autoencoder=None)


def compile_fault(world: World) -> str:
    """Why the transformer cannot be compiled on this rank, and what can be done; "" when it can."""
    if world.plan == "zero3":
        return "parallel=zero3 replaces weights while layers run, which is not compiled; parallel=fsdp shards them too"
    lack = missing_compiler(world.device)
    return lack and f"torch.compile needs {lack}, which is not installed here"


def lora_of(config: LoraConfig, student: Path | None = None) -> Lora:
    """The adapters to merge: those of the config, else the student's, else none."""
    path = config.path or student
    return read_lora(path, config.alpha) if path else NO_LORA


def find_device(name: str, local_rank: int | None = None) -> torch.device:
    """The torch device for auto, cpu, cuda or cuda:N; with `local_rank`, cuda is spread over the GPUs of the machine.

    Raises ValueError for cuda on a machine without a usable GPU.
    """
    if name == "auto":
        _warn_of_unused_driver()
        return find_device("cuda" if torch.cuda.is_available() else "cpu", local_rank)
    if name == "cuda" and local_rank is not None and torch.cuda.is_available():
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"run.device={name}: this machine has no CUDA device that torch can use; use run.device=cpu")
    return torch.device(name)


@cache
def _warn_of_unused_driver() -> None:
    """Warn once where torch is built for CUDA and a driver is installed, but torch finds no device: often the driver is too old for it."""
    if torch.version.cuda and not torch.cuda.is_available() and (driver := driver_version()):
        wants = f"CUDA {torch.version.cuda}, which wants driver {DRIVERS.get(torch.version.cuda.split('.')[0], 'of that time')} or newer"
        ways = "update it, or install torch from PyTorch's wheel index for an older CUDA (pytorch.org/get-started/locally lists them)"
        log.warning("device=auto: the CPU is used: NVIDIA's driver is %s, and torch is built for %s; %s", driver, wants, ways)


def set_tf32(dtype: torch.dtype) -> None:
    """Compute float32 convolutions in float32 where the networks are asked for in float32.

    Elsewhere cuDNN rounds their inputs to TF32: torch's default, with which the published code runs its float32 VAE.
    """
    torch.backends.cudnn.allow_tf32 = dtype != torch.float32
