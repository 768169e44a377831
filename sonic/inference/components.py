"""Builds the encoders, the transformer and the autoencoder that a config describes, with their weights, on their device."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from sonic import assets
from sonic.checkpoint.converted import Checkpoint
from sonic.checkpoint.lora import NO_LORA, Lora, read_lora
from sonic.checkpoint.weights import load_weights
from sonic.config import LoraConfig, ModelConfig, RunConfig, one_of, precision_of
from sonic.encoders.speech import SPEECH_ENCODERS
from sonic.model.attention import Attention, attention_for, sdpa
from sonic.model.blocks import attend_by
from sonic.model.dit import AvatarDiT
from sonic.parallel.context import DistributedContext
from sonic.parallel.mesh import World
from sonic.parallel.parallelize import build_parallel_model
from sonic.parallel.vae_rank import RemoteAutoencoder
from sonic.system.program import written
from sonic.types import pick
from sonic.vae.motion_vae import WarpAutoencoder
from sonic.vae.wan_vae import WanAutoencoder

log = logging.getLogger("sonic.inference")

AUTOENCODERS: Mapping[str, Callable[[], nn.Module]] = {"warp": WarpAutoencoder}
BUNDLED = Path(assets.__file__).parent
IN_PACKAGE = "bundled:"  # prefix of the name of a weight file in the package
STUDENT, TEACHER = "student", "teacher"  # special values of model.weights: the bundled weights with or without distilled adapters
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
    """All networks that this rank needs to make a video.

    The preview has its speech encoder in `speech`. A published model has a `checkpoint` instead, which loads its encoders one at a time;
    `load` loads the transformer and the autoencoder after them.
    """

    config: ModelConfig
    context: DistributedContext
    make_model: Callable[[], AvatarDiT]
    make_autoencoder: Callable[[], Autoencoder]
    dtype: torch.dtype = torch.float32
    weights: str = ""  # the weight files of the transformer, as text for the log
    speech: nn.Module | None = None
    checkpoint: Checkpoint | None = None
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
            self.networks = LoadedNetworks(model, self.make_autoencoder() if world.leads or world.holds_vae else None)
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


def build_components(config: ModelConfig, run: RunConfig, *, steps: int, context: DistributedContext | None = None) -> Components:
    """The components of a configured model, with the weights for `steps` sampling steps.

    `load` builds the transformer under the plan of `context` (default: one device). The preview's encoder and autoencoder are loaded
    here. Raises ValueError when weights are missing, damaged or of another shape, or the machine has no such device.
    """
    if run.threads:
        torch.set_num_threads(run.threads)
    context = context or DistributedContext(World("single", find_device(run.device)))
    dtype = pick(DTYPES, precision_of(run.dtype, config), "run.dtype")
    attention = attention_for(run.attention, context.world.device)
    if config.autoencoder == "wan":
        checkpoint = Checkpoint.open(Path(_needed(config)))
        return _checkpoint_components(checkpoint.config(config), checkpoint, context, dtype=dtype, attention=attention)
    files, student = weight_files(config), student_of(config, steps)
    autoencoder, speech = untrained_encoders(config, context.world.device)
    load_weights(autoencoder, files.autoencoder)
    load_weights(speech, files.speech)
    lora = lora_of(config.lora, student)
    return Components(
        config,
        context,
        make_model=lambda: _transformer(config, files.dit, context, lora=lora, dtype=dtype, attention=attention),
        make_autoencoder=lambda: RemoteAutoencoder(context.vae_channel) if _has_remote_vae(context.world) else autoencoder,
        dtype=dtype,
        weights=weights_in_words(config, steps),
        speech=speech,
    )


def _checkpoint_components(
    config: ModelConfig, checkpoint: Checkpoint, context: DistributedContext, *, dtype: torch.dtype, attention: Attention = sdpa
) -> Components:
    """The components of a published model; nothing is loaded yet.

    The Wan VAE runs in float32 for whole clips, because the last frames of each clip are encoded again for the next one; for a stream it
    runs in run.dtype, because the KV rings need the memory. When another rank owns the VAE, a proxy calls that rank.
    """

    def make_model() -> AvatarDiT:
        return _transformer(config, checkpoint.weights, context, lora=lora_of(config.lora), dtype=dtype, attention=attention)

    def make_autoencoder() -> Autoencoder:
        if _has_remote_vae(context.world):
            return RemoteAutoencoder(context.vae_channel)
        return checkpoint.autoencoder(context.world.device, torch.float32 if config.rollout.clip_frames else dtype)

    weights = _named(checkpoint.weights, config.lora.path)
    return Components(config, context, make_model, make_autoencoder, dtype=dtype, weights=weights, checkpoint=checkpoint)


def checkpoint_components(config: ModelConfig, device: torch.device) -> Components:
    """The components of the published model in model.weights on one device, in float32; nothing is loaded yet."""
    checkpoint = Checkpoint.open(transformer_weights(config).parent)
    context = DistributedContext(World("single", device))
    return _checkpoint_components(checkpoint.config(config), checkpoint, context, dtype=torch.float32)


def _transformer(
    config: ModelConfig, weights: Path, context: DistributedContext, *, lora: Lora, dtype: torch.dtype, attention: Attention
) -> AvatarDiT:
    """This rank's share of the transformer, with the adapter merged into its weights."""
    model = build_parallel_model(config, weights, context, lora=lora, dtype=dtype)
    attend_by(model, attention)
    return model


def preview_components(
    config: ModelConfig,
    model: AvatarDiT,
    autoencoder: nn.Module,
    *,
    speech: nn.Module,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Components:
    """The components of a preview model whose networks are built already, on one device."""
    context = DistributedContext(World("single", device))
    networks = LoadedNetworks(model, autoencoder)
    return Components(config, context, lambda: model, lambda: autoencoder, dtype=dtype, speech=speech, networks=networks)


def untrained_components(config: ModelConfig, *, device: torch.device, dtype: torch.dtype = torch.float32) -> Components:
    """The components of a preview model on one device, with their initial weights."""
    model = AvatarDiT(config).to(device, dtype).eval().requires_grad_(False)
    autoencoder, speech = untrained_encoders(config, device)
    return preview_components(config, model, autoencoder, speech=speech, device=device, dtype=dtype)


def untrained_encoders(config: ModelConfig, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """The autoencoder and the speech encoder of a model on a device, with their initial weights."""
    makers = (
        pick(AUTOENCODERS, config.autoencoder, "model.autoencoder"),
        pick(SPEECH_ENCODERS, config.speech_encoder, "model.speech_encoder"),
    )
    return tuple(make().to(device).eval().requires_grad_(False) for make in makers)


def _has_remote_vae(world: World) -> bool:
    """Whether this rank decodes through the autoencoder of another rank."""
    return world.vae_rank and world.leads


def lora_of(config: LoraConfig, student: Path | None = None) -> Lora:
    """The adapters to merge: those of the config, else the student's, else none."""
    path = config.path or student
    return read_lora(path, config.alpha) if path else NO_LORA


class WeightFiles(NamedTuple):
    """Paths of the weight files of the transformer, the autoencoder and the speech encoder."""

    dit: Path
    autoencoder: Path
    speech: Path


def weight_files(config: ModelConfig) -> WeightFiles:
    """The weight files of a model with bundled weights.

    If model.weights is a folder, all files are in it; if it is a file, that replaces the bundled transformer. Raises ValueError when
    it does not exist.
    """
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


def named_weights(name: str) -> Path:
    """The weight file that init_from names: bundled:STEM means STEM.safetensors in the package, anything else is a path."""
    if not name.startswith(IN_PACKAGE):
        return Path(name)
    there = {f"{IN_PACKAGE}{path.stem}": path for path in sorted(BUNDLED.glob("*.safetensors"))}
    one_of(name, list(there), "init_from")
    return there[name]


def student_of(config: ModelConfig, steps: int) -> Path | None:
    """The bundled adapters distilled for `steps` sampling steps; None when there are none or the user chose other weights.

    With model.weights=student, the nearest smaller number of steps is used instead, and ValueError is raised when there is none.
    """
    if config.weights not in ("", STUDENT) or config.lora.path:
        return None
    there = _students(config)
    if config.weights == "" or steps in there:
        return there.get(steps)
    if fewer := [number for number in there if number < steps]:
        return there[max(fewer)]
    raise ValueError(
        f"model.weights={STUDENT}: no bundled student of model={config.name} for sampler.sample_steps={steps}; "
        f"use {f'sampler.sample_steps={min(there)} or more' if there else 'another model'}, or weights={TEACHER}"
    )


def _students(config: ModelConfig) -> dict[int, Path]:
    """The bundled adapter files of a model, keyed by the number of sampling steps they were distilled for."""
    start, end = f"{config.name}_", "step"
    return {int(path.stem.removeprefix(start).removesuffix(end)): path for path in BUNDLED.glob(f"{start}*{end}.safetensors")}


def _named(weights: Path, adapters: str | Path | None) -> str:
    """Weight files as text for the log: bundled files by name, others by path."""
    paths = [Path(path) for path in (weights, adapters) if path]
    return " + ".join(path.name if path.parent == BUNDLED else str(path) for path in paths)


def weights_in_words(config: ModelConfig, steps: int) -> str:
    """The weights that the transformer of a bundled model loads for `steps` sampling steps, as text for the log."""
    student = student_of(config, steps)
    return _named(weight_files(config).dit, config.lora.path or student) + (_why_none(config, steps) if student is None else "")


def _why_none(config: ModelConfig, steps: int) -> str:
    """A note for the log that no student exists for `steps`; empty when the user chose the weights."""
    if config.weights or config.lora.path:
        return ""
    learnt = ", ".join(map(str, sorted(_students(config)))) or "none"
    return f" without adapters (no bundled student has learnt {steps} steps; there are those of: {learnt})"


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


def transformer_weights(config: ModelConfig) -> Path:
    """The file or folder with the weights of the transformer. Raises ValueError when there is none or it is for another model."""
    if config.autoencoder != "wan":
        return weight_files(config).dit
    checkpoint = Checkpoint.open(Path(_needed(config)))
    checkpoint.config(config)
    return checkpoint.folder / "dit"


def settled_model(config: ModelConfig) -> ModelConfig:
    """The config of the model that will run; a converted checkpoint replaces it with its own. Raises ValueError without a checkpoint."""
    return Checkpoint.open(Path(_needed(config))).config(config) if config.autoencoder == "wan" else config


def _needed(config: ModelConfig) -> str:
    """The checkpoint folder of a model without bundled weights. Raises ValueError when none is named."""
    if not config.weights:
        raise ValueError(
            f"model={config.name} has no bundled weights: it needs checkpoint=FOLDER, made by {written('convert')} of the "
            "published Wan2.2-S2V-14B (for live_avatar_14b also LiveAvatar); model=preview needs nothing"
        )
    return config.weights
