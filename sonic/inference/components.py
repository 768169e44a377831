"""The composition root: a config becomes the parts of the main job, with their weights, on their device."""

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
from sonic.checkpoint.load import Lora
from sonic.checkpoint.weights import load_weights
from sonic.config import LoraConfig, ModelConfig, RunConfig, one_of, precision_of
from sonic.encoders.speech import SPEECH_ENCODERS
from sonic.model.attention import Attention, attention_for, sdpa
from sonic.model.blocks import attend_by
from sonic.model.dit import AvatarDiT
from sonic.model.lora import lora_alpha, read_lora
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
IN_PACKAGE = "bundled:"  # before the name of a file among them
STUDENT, TEACHER = "student", "teacher"  # what model.weights may say instead of a place: bundled weights with adapters or without
Autoencoder = WarpAutoencoder | WanAutoencoder | RemoteAutoencoder
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class LoadedNetworks(NamedTuple):
    """What a rank denoises and decodes with. A rank that only has the autoencoder has no transformer, one that only repeats forwards no
    autoencoder."""

    model: AvatarDiT | None
    autoencoder: Autoencoder | None


@dataclass
class Components:
    """What a video is made with on this rank.

    Either `speech` is at hand, or `checkpoint` is where the encoders come from, one at a time, before `load` loads the large networks.
    """

    config: ModelConfig
    context: DistributedContext
    make_model: Callable[[], AvatarDiT]
    make_autoencoder: Callable[[], Autoencoder]
    dtype: torch.dtype = torch.float32
    weights: str = ""  # what the transformer is loaded from, in words
    speech: nn.Module | None = None
    checkpoint: Checkpoint | None = None
    networks: LoadedNetworks | None = None

    @property
    def device(self) -> torch.device:
        """Where this rank works."""
        return self.context.world.device

    def load(self) -> LoadedNetworks:
        """Load the transformer and the autoencoder, as far as this rank needs them; a second call gives what is there."""
        world = self.context.world
        if self.networks is None:
            model = None if world.holds_vae else self.make_model()
            self.networks = LoadedNetworks(model, self.make_autoencoder() if world.leads or world.holds_vae else None)
        return self.networks

    @property
    def model(self) -> AvatarDiT:
        """The transformer that `load` has loaded."""
        assert self.networks is not None, "load() comes first"
        return self.networks.model

    @property
    def autoencoder(self) -> Autoencoder:
        """The autoencoder that `load` has loaded, or what asks the rank that has it."""
        assert self.networks is not None, "load() comes first"
        return self.networks.autoencoder

    def with_model(self, model: AvatarDiT) -> Components:
        """The same with a transformer that is there already."""
        return replace(self, make_model=lambda: model, networks=None)


def build_components(config: ModelConfig, run: RunConfig, *, steps: int, context: DistributedContext | None = None) -> Components:
    """Encoders, transformer and autoencoder as configured, with weights for so many sampling steps.

    The transformer is built under the plan of `context` (default: this device alone); what a checkpoint holds is loaded by `load`.
    Raises ValueError when weights are missing, damaged or of another shape, or the machine has no such device.
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
    """The parts of a published model, none of them loaded.

    The Wan VAE is in float32 for whole clips, each of which begins with frames of the last one encoded again; in run.dtype for a
    stream, whose rings need the memory. Where another rank has it, that one is asked.
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
    """The parts of the published model in model.weights on one device, in float32, none of them loaded."""
    checkpoint = Checkpoint.open(transformer_weights(config).parent)
    context = DistributedContext(World("single", device))
    return _checkpoint_components(checkpoint.config(config), checkpoint, context, dtype=torch.float32)


def _transformer(
    config: ModelConfig, weights: Path, context: DistributedContext, *, lora: Lora, dtype: torch.dtype, attention: Attention
) -> AvatarDiT:
    """This rank's part of the transformer with the adapter merged."""
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
    """Parts of the preview that are there already, on one device."""
    context = DistributedContext(World("single", device))
    networks = LoadedNetworks(model, autoencoder)
    return Components(config, context, lambda: model, lambda: autoencoder, dtype=dtype, speech=speech, networks=networks)


def untrained_components(config: ModelConfig, *, device: torch.device, dtype: torch.dtype = torch.float32) -> Components:
    """The same parts on one device, before any weights are loaded."""
    model = AvatarDiT(config).to(device, dtype).eval().requires_grad_(False)
    autoencoder, speech = untrained_encoders(config, device)
    return preview_components(config, model, autoencoder, speech=speech, device=device, dtype=dtype)


def untrained_encoders(config: ModelConfig, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """Autoencoder and speech encoder on a device, before any weights are loaded."""
    makers = (
        pick(AUTOENCODERS, config.autoencoder, "model.autoencoder"),
        pick(SPEECH_ENCODERS, config.speech_encoder, "model.speech_encoder"),
    )
    return tuple(make().to(device).eval().requires_grad_(False) for make in makers)


def _has_remote_vae(world: World) -> bool:
    """Whether this rank asks another one that has the autoencoder."""
    return world.vae_rank and world.leads


def lora_of(config: LoraConfig, student: Path | None = None) -> Lora:
    """The adapters to merge: those of the config, else the student's, else none."""
    path = config.path or student
    return Lora(read_lora(path), config.alpha or lora_alpha(path)) if path else Lora({}, 0.0)


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


def named_weights(name: str) -> Path:
    """The file that init_from names: bundled:STEM is STEM.safetensors of those in the package, all else a path."""
    if not name.startswith(IN_PACKAGE):
        return Path(name)
    there = {f"{IN_PACKAGE}{path.stem}": path for path in sorted(BUNDLED.glob("*.safetensors"))}
    one_of(name, list(there), "init_from")
    return there[name]


def student_of(config: ModelConfig, steps: int) -> Path | None:
    """Bundled adapters that were distilled for so many sampling steps; None without them, or when others are asked for.

    model.weights=student takes those for fewer steps where there are none. Raises ValueError when there are none of these either.
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
    """Bundled adapters by the number of steps that they were distilled for."""
    start, end = f"{config.name}_", "step"
    return {int(path.stem.removeprefix(start).removesuffix(end)): path for path in BUNDLED.glob(f"{start}*{end}.safetensors")}


def _named(weights: Path, adapters: str | Path | None) -> str:
    """Files or folders in words: bundled ones by their names alone."""
    paths = [Path(path) for path in (weights, adapters) if path]
    return " + ".join(path.name if path.parent == BUNDLED else str(path) for path in paths)


def weights_in_words(config: ModelConfig, steps: int) -> str:
    """What the transformer of a model with bundled weights is loaded from for so many sampling steps."""
    student = student_of(config, steps)
    return _named(weight_files(config).dit, config.lora.path or student) + (_why_none(config, steps) if student is None else "")


def _why_none(config: ModelConfig, steps: int) -> str:
    """Why no student runs although nobody asked for other weights; empty where somebody did."""
    if config.weights or config.lora.path:
        return ""
    learnt = ", ".join(map(str, sorted(_students(config)))) or "none"
    return f" without adapters (no bundled student has learnt {steps} steps; there are those of: {learnt})"


def find_device(name: str, local_rank: int | None = None) -> torch.device:
    """The device called auto, cpu, cuda or cuda:N; of several ranks on a machine each takes its own where there are enough."""
    if name == "auto":
        return find_device("cuda" if torch.cuda.is_available() else "cpu", local_rank)
    if name == "cuda" and local_rank is not None and torch.cuda.is_available():
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"run.device={name}: this machine has no CUDA device that torch can use; use run.device=cpu")
    return torch.device(name)


def transformer_weights(config: ModelConfig) -> Path:
    """The file or folder of the transformer alone. Raises ValueError when it is for another model, or there is none."""
    if config.autoencoder != "wan":
        return weight_files(config).dit
    checkpoint = Checkpoint.open(Path(_needed(config)))
    checkpoint.config(config)
    return checkpoint.folder / "dit"


def settled_model(config: ModelConfig) -> ModelConfig:
    """The config of the model that will run: a converted checkpoint brings its own. Raises ValueError where there is none."""
    return Checkpoint.open(Path(_needed(config))).config(config) if config.autoencoder == "wan" else config


def _needed(config: ModelConfig) -> str:
    """The checkpoint of a model that has no bundled weights."""
    if not config.weights:
        raise ValueError(
            f"model={config.name} has no bundled weights: it needs checkpoint=FOLDER, made by {written('convert')} of the "
            "published Wan2.2-S2V-14B (for live_avatar_14b also LiveAvatar); model=preview needs nothing"
        )
    return config.weights
