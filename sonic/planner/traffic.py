"""Counts the kernels of one forward, and the bytes that they read and write, by running the model on the fake GPU."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sonic.config import ModelConfig
from sonic.geometry import BlockSpan
from sonic.model.dit import AvatarDiT
from sonic.model.execution import LOCAL
from sonic.planner.extrapolate import of_all_layers
from sonic.planner.fake_gpu import FakeGpuMode, fake_gpu
from sonic.planner.track import DTYPES, caches_of, inputs_of, made_in
from sonic.planner.workload import Workload

MULTIPLY = ("mm", "addmm", "_addmm_activation", "bmm", "baddbmm", "convolution", "_scaled_dot_product_flash_attention")
NO_KERNEL = ("detach", "empty", "empty_like", "empty_strided", "lift_fresh", "new_empty", "_unsafe_view")


class Kernels(TorchDispatchMode):
    """Context that counts every operation with a kernel: `launches`, and the bytes of those that multiply and of all `others`."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter(launches=0, multiply=0, others=0)

    def __torch_dispatch__(self, func: Any, types: Any, *given: Any) -> Any:
        """Run the operation and count it."""
        args, named = given
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        out, name = func(*args, **(named or {})), func.__name__.split(".")[0]
        if not func.is_view and name not in NO_KERNEL:
            self.counts["launches"] += 1
            tensors = [leaf for leaf in tree_leaves((args, named, out)) if isinstance(leaf, Tensor)]
            self.counts["multiply" if name in MULTIPLY else "others"] += sum(tensor.nbytes for tensor in tensors)
        return out


def forward_kernels(work: Workload) -> dict[str, float]:
    """The counts of one forward of a clip, or of a block when the KV rings are full; and `layer`, the launches of one layer."""

    def measure(model: ModelConfig) -> dict[str, float]:
        return dict(_kernels(replace(work, model=model)))

    found = of_all_layers(work.model, measure)
    bare = replace(work.model, audio=replace(work.model.audio, inject_layers=[]))
    one, two = (measure(replace(bare, trunk=replace(bare.trunk, num_layers=count))) for count in (1, 2))
    return {**found, "layer": two["launches"] - one["launches"]}


def _kernels(work: Workload) -> Counter[str]:
    with fake_gpu(), FakeGpuMode(), torch.no_grad(), made_in(DTYPES[work.dtype_bytes]):
        model, (latents, timestep, conditions) = AvatarDiT(work.model), inputs_of(work)
        if work.clip_frames:
            with Kernels() as kernels:
                model(latents, timestep, conditions)
            return kernels.counts
        (cache,) = caches_of(model, replace(work, steps=1, guided=False), conditions=conditions, execution=LOCAL)
        model.prefill(conditions, cache)
        newest = work.model.rollout.window_blocks - 1
        for index in range(newest):
            cache.rings[0].begin(index)
        inputs = model.prepare_block(conditions, BlockSpan(newest, 0, work.latent_frames))
        with Kernels() as kernels:
            model.denoise_block(latents, timestep, inputs, cache=cache, ring=cache.rings[0])
        return kernels.counts
