"""The interface of a family of models, and the functions that find the family of a config and build its components."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from sonic.checkpoint.bundled import BUNDLED
from sonic.config import ModelConfig, RunConfig, SamplerConfig, precision_of
from sonic.data.data_config import PrecomputeConfig
from sonic.data.shards import Encoders
from sonic.families import FAMILIES
from sonic.inference.components import DTYPES, Components, compile_fault, find_device, lora_of, set_tf32
from sonic.inference.distributed_rollout import worker_loop
from sonic.inference.infer_config import InferConfig
from sonic.inference.inputs import InMemory, Settings
from sonic.inference.report import StageTimer
from sonic.model.attention import attention_for
from sonic.model.blocks import set_attention
from sonic.parallel.context import DistributedContext
from sonic.parallel.mesh import World
from sonic.parallel.parallelize import build_parallel_model
from sonic.sampling.samplers import SAMPLERS
from sonic.sampling.schedules import sigmas_of
from sonic.types import FrameChunk, Inputs, pick

WINDOWS_ONLY = ("sampler.audio_guide_scale", "face.missing", "decode.chunk_frames", "decode.overlap_frames")  # options of one family
Encoded = Any  # what `condition` gives to `generate`: a type of the family's own


class Family(ABC):
    """What differs between models with different autoencoders. The rest of the program asks a family and never which one it is.

    To add one, write these methods in a module of this folder and register the class in `FAMILIES`. Its models are files in conf/model
    with `family: NAME`. A family has no state: what is loaded is in its `Components`, usually a subclass with the family's encoders.
    """

    loads_late: ClassVar[bool]  # whether the transformer is loaded after the inputs are encoded, in the memory of the encoders

    # a video

    @abstractmethod
    def open(self, config: InferConfig, memory: InMemory) -> Inputs:
        """Read and check the inputs of a video. Raises ValueError with one sentence, also for options that this family does not read."""

    def settled_model(self, config: ModelConfig) -> ModelConfig:
        """The config of the model that will run; a converted checkpoint replaces it with its own. Raises ValueError without weights."""
        return config

    @abstractmethod
    def transformer_weights(self, config: ModelConfig) -> Path:
        """The file or folder with the weights of the transformer. Raises ValueError when there is none or it is for another model."""

    def weights_in_words(self, config: ModelConfig, steps: int) -> str:
        """The weights that the transformer loads for `steps` sampling steps, as text for the log: bundled files by name."""
        files = [self.transformer_weights(config), config.lora.path or self.student(config, steps)]
        return " + ".join(path.name if path.parent == BUNDLED else str(path) for path in map(Path, filter(None, files)))

    def timesteps(self, sampler: SamplerConfig) -> list[float]:
        """The timesteps that the network is given, in order: those of the sampler, in other families of its own."""
        return SAMPLERS[sampler.name].timesteps(sigmas_of(sampler.schedule, sampler.sample_steps, sampler.sample_shift))

    def student(self, config: ModelConfig, steps: int) -> Path | None:
        """The bundled adapters that the transformer loads for `steps` sampling steps; None without."""
        return None

    def build_model(self, config: ModelConfig, run: RunConfig, *, context: DistributedContext, dtype: torch.dtype, steps: int) -> nn.Module:
        """The transformer with its weights under the plan of `context`, whose execution is set; other families build another network.

        Raises ValueError when weights are missing, damaged or of another shape.
        """
        attention = attention_for(run.attention, context.world.device, dtype, head_dim=config.trunk.hidden_dim // config.trunk.num_heads)
        lora = lora_of(config.lora, self.student(config, steps))
        model = build_parallel_model(config, self.transformer_weights(config), context, lora=lora, dtype=dtype)
        set_attention(model, attention)
        return model

    def serve(self, components: Components) -> None:
        """On a rank that does not lead: run the forwards of the leading rank until it shuts this rank down."""
        worker_loop(components.model, components.context, components.dtype)

    @abstractmethod
    def components(self, config: ModelConfig, context: DistributedContext, dtype: torch.dtype) -> Components:
        """The autoencoder and the encoders of a model, without its transformer. Raises ValueError when weights are missing or damaged."""

    @abstractmethod
    def preload_prompts(self, components: Components, prompts: Iterable[str]) -> None:
        """Encode the prompts of all videos before the transformer is loaded, if the family reads prompts."""

    @abstractmethod
    def condition(self, inputs: Inputs, components: Components, settings: Settings) -> Encoded:
        """Encode the inputs on the device of the networks."""

    @abstractmethod
    def generate(
        self, inputs: Inputs, encoded: Encoded, components: Components, *, settings: Settings, timer: StageTimer
    ) -> Iterator[FrameChunk]:
        """Yield the frames of a video in order, as soon as they are decoded."""

    # data sets and trainings

    @abstractmethod
    def clip_encoders(self, config: PrecomputeConfig) -> Encoders:
        """Build the encoders that make clips. Raises ValueError when their weights are missing."""

    @abstractmethod
    def encoder_hashes(self, config: ModelConfig, autoencoder: str = "") -> dict[str, str]:
        """A hash of 16 digits of each encoder's weights (`autoencoder` = a file in place of the model's own); "" without weights."""


def family_of(config: ModelConfig) -> Family:
    """The family of a model. Its module is imported at the first call."""
    module, _, name = pick(FAMILIES, config.family, "model.family").path.rpartition(".")
    return getattr(import_module(module), name)()


def refuse_unread(config: InferConfig, options: Iterable[str], why: str) -> None:
    """Raise ValueError when one of the options has not its default value; `why` says why the family does not read it, and the way out."""
    default = InferConfig()
    for name in options:
        if (value := attrgetter(name)(config)) != attrgetter(name)(default):
            raise ValueError(f"{name}={value}: {why}")


def build_components(
    config: ModelConfig, run: RunConfig, *, steps: int, context: DistributedContext | None = None, family: Family | None = None
) -> Components:
    """The components of a configured model, with the weights for `steps` sampling steps.

    `load` builds the transformer under the plan of `context` (default: one device). `family` replaces that of the config. Raises
    ValueError when weights are missing, damaged or of another shape, or the machine has no such device.
    """
    if run.threads:
        torch.set_num_threads(run.threads)
    context = context or DistributedContext(World("single", find_device(run.device)))
    dtype = pick(DTYPES, precision_of(run.dtype, config), "run.dtype")
    if run.compile == "true" and (fault := compile_fault(context.world)):
        raise ValueError(f"run.compile=true: {fault}; use run.compile=false")
    set_tf32(dtype)
    family = family or family_of(config)
    config = family.settled_model(config)
    make_model = partial(family.build_model, config, run, context=context, dtype=dtype, steps=steps)
    weights = family.weights_in_words(config, steps)
    found = replace(family.components(config, context, dtype), make_model=make_model, weights=weights, compile=run.compile)
    if not family.loads_late:
        found.load()
    return found
