"""Inference with DeepSpeed ZeRO-3: every rank stores a slice of every weight, and a layer's weights are gathered while it runs.

It does the same as FSDP2 (fsdp.py), for clusters on which DeepSpeed is used.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from sonic.model.dit import AvatarDiT
from sonic.model.execution import Execution, TrunkInputs
from sonic.parallel.mesh import World
from sonic.parallel.parallel_config import ParallelConfig
from sonic.parallel.shard_units import ENDS

PREFETCH_NUMBERS = 50_000_000  # parameters per unit of parallel.prefetch; DeepSpeed's default


def allocate_slices(model: AvatarDiT, world: World, config: ParallelConfig) -> None:
    """Allocate every weight and keep this rank's slice of it; weights outside blocks, injectors and ENDS stay whole.

    Raises ValueError when DeepSpeed is not installed.
    """
    deepspeed, settings = _deepspeed(), _settings(model, world, config)
    os.environ["LOCAL_RANK"] = str(world.device.index or 0)  # DeepSpeed reads its device from here
    sliced = [*_ends(model), *model.blocks, *model.audio_injectors]
    for part in sliced:
        for module in reversed(list(part.modules())):  # submodules first, because DeepSpeed also visits the submodules of a module
            if list(module.parameters(recurse=False)):
                module.to_empty(device=world.device, recurse=False)
                deepspeed.zero.Init(module=module, config_dict_or_path=settings)
    done = {id(module) for part in sliced for module in part.modules()}
    for module in model.modules():
        if id(module) not in done:
            module.to_empty(device=world.device, recurse=False)


def start_engines(model: AvatarDiT, world: World, config: ParallelConfig) -> Execution:
    """Start two DeepSpeed engines: one gathers the layers ahead of use, in the order of the last pass; the other gathers the ENDS.

    They are separate because every pass through the layers is the same, but the use of the ENDS between passes is not.
    """
    deepspeed, settings = _deepspeed(), _settings(model, world, config)
    layers = Layers(model)
    for part in (layers, nn.ModuleList(_ends(model))):
        deepspeed.initialize(model=part, config=settings, dist_init_required=False)
    model.eval()

    def run_blocks(model: nn.Module, inputs: Sequence[TrunkInputs], contexts: Sequence[Callable]) -> list[TrunkInputs]:
        tokens = layers(inputs=inputs, contexts=contexts)
        return [each._replace(tokens=found) for each, found in zip(inputs, tokens, strict=True)]

    return Execution(run_blocks=run_blocks)


class Layers(nn.Module):
    """All blocks and injectors as one module, for DeepSpeed's hooks."""

    def __init__(self, model: AvatarDiT) -> None:
        super().__init__()
        self.blocks, self.audio_injectors, self.run = model.blocks, model.audio_injectors, model.run_blocks

    def forward(self, inputs: Sequence[TrunkInputs], contexts: Sequence[Callable]) -> list[Tensor]:
        """The tokens of each sequence after the last block."""
        return [outputs.tokens for outputs in self.run(inputs, contexts)]


def _ends(model: AvatarDiT) -> list[nn.Module]:
    """The modules named ENDS that the model has."""
    return [module for name in ENDS if (module := getattr(model, name)) is not None]


def _settings(model: AvatarDiT, world: World, config: ParallelConfig) -> dict:
    """DeepSpeed's settings. `memory_efficient_linear` is off because it would replace torch's F.linear."""
    offload = {"offload_param": {"device": "cpu", "pin_memory": world.device.type == "cuda"}} if config.cpu_offload else {}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": next(model.parameters()).dtype == torch.bfloat16},
        "zero_optimization": {
            "stage": 3,
            "memory_efficient_linear": False,
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": config.prefetch * PREFETCH_NUMBERS,
            "stage3_max_reuse_distance": 0,
            **offload,
        },
    }


def _deepspeed():
    """The imported package. Raises ValueError with the command that installs it when it is missing."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError("parallel=zero3 needs DeepSpeed: pip install deepspeed, or use parallel=fsdp, which needs nothing") from error
    use_gloo()
    return deepspeed


def use_gloo() -> None:
    """Make DeepSpeed use gloo on CPUs; its own communication through shared memory would first be compiled, which takes minutes."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
