"""ZeRO-3 for inference, by DeepSpeed: every rank keeps a slice of every weight, and a layer's are gathered while it runs.

What FSDP2 does natively (fsdp.py), for those whose cluster runs DeepSpeed. The only place that imports it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from sonic.model.dit import AvatarDiT
from sonic.model.execution import Execution
from sonic.model.trunk_inputs import TrunkInputs
from sonic.parallel.mesh import World
from sonic.parallel.parallel_config import ParallelConfig
from sonic.parallel.shard_units import ENDS

PREFETCH_NUMBERS = 50_000_000  # for each of parallel.prefetch; DeepSpeed's usual amount


def cut_nothing(model: AvatarDiT, world: World, config: ParallelConfig) -> None:
    """Weights are cut one by one when they get memory. Raises ValueError before that where DeepSpeed is missing."""
    _deepspeed()


def place_slices(model: AvatarDiT, world: World, config: ParallelConfig) -> None:
    """Give every weight memory for a moment and keep a slice of it; what lies outside blocks, injectors and ENDS stays whole."""
    deepspeed, settings = _deepspeed(), _settings(model, world, config)
    os.environ["LOCAL_RANK"] = str(world.device.index or 0)  # where DeepSpeed looks for its device
    shared = _shared(model)
    for part in shared:
        for module in reversed(list(part.modules())):  # what is inside first: DeepSpeed looks into a module as well
            if list(module.parameters(recurse=False)):
                module.to_empty(device=world.device, recurse=False)
                deepspeed.zero.Init(module=module, config_dict_or_path=settings)
    sliced = {id(module) for part in shared for module in part.modules()}
    for module in model.modules():
        if id(module) not in sliced:
            module.to_empty(device=world.device, recurse=False)


def start_engines(model: AvatarDiT, world: World, config: ParallelConfig) -> Execution:
    """Let DeepSpeed gather what runs: the layers ahead, in the order of the last pass; the ends one by one.

    They are apart because a pass through the layers is always the same, and what happens between passes is not.
    """
    deepspeed, settings = _deepspeed(), _settings(model, world, config)
    layers = Layers(model)
    ends = nn.ModuleList(getattr(model, name) for name in ENDS if getattr(model, name) is not None)
    for part in (layers, ends):
        deepspeed.initialize(model=part, config=settings, dist_init_required=False)
    model.eval()

    def run_blocks(model: nn.Module, inputs: Sequence[TrunkInputs], reaches: Sequence[Callable]) -> list[TrunkInputs]:
        tokens = layers(inputs=inputs, reaches=reaches)
        return [each._replace(tokens=found) for each, found in zip(inputs, tokens, strict=True)]

    return Execution(run_blocks=run_blocks)


class Layers(nn.Module):
    """All blocks as a module of their own, which is what DeepSpeed hooks into."""

    def __init__(self, model: AvatarDiT) -> None:
        super().__init__()
        self.blocks, self.audio_injectors, self.run = model.blocks, model.audio_injectors, model.run_blocks

    def forward(self, inputs: Sequence[TrunkInputs], reaches: Sequence[Callable]) -> list[Tensor]:
        """The tokens of each sequence behind the last block."""
        return [outputs.tokens for outputs in self.run(inputs, reaches)]


def _shared(model: AvatarDiT) -> list[nn.Module]:
    ends = [getattr(model, name) for name in ENDS]
    return [*(end for end in ends if end is not None), *model.blocks, *model.audio_injectors]


def _settings(model: AvatarDiT, world: World, config: ParallelConfig) -> dict:
    """DeepSpeed's own knobs. It would put another F.linear in the place of torch's, which is left as it is."""
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
    """The package; ValueError with what installs it when it is missing."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError("parallel=zero3 needs DeepSpeed: pip install deepspeed, or use parallel=fsdp, which needs nothing") from error
    send_plainly()
    return deepspeed


def send_plainly() -> None:
    """Let ranks on CPUs send through gloo: DeepSpeed's own way through shared memory would be compiled first, for minutes."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
