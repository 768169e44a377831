"""Loads a transformer's weights: it is built on the meta device, sharded, then filled. Each rank reads only its own slices of the file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from sonic.checkpoint.lora import NO_LORA, Lora
from sonic.checkpoint.tensor_files import StoredTensor
from sonic.checkpoint.weights import stored_weights
from sonic.config import ModelConfig
from sonic.model.adapters import ADAPTERS
from sonic.model.dit import AvatarDiT
from sonic.system.heartbeat import heartbeat

Shapes = Mapping[str, Sequence[int]]


def without_memory(config: ModelConfig, network: Callable[[ModelConfig], nn.Module] = AvatarDiT) -> nn.Module:
    """A transformer, or another `network`, on the meta device, without memory for its weights."""
    with torch.device("meta"):
        return network(config)


def shapes_of(model: nn.Module) -> Shapes:
    """The unsharded shapes of all weights of a weights file, by name. Trainable adapters are left out: they are not in the file."""
    return {name: shape_of(weight) for name, weight in model.named_parameters() if ADAPTERS not in name.split(".")}


@torch.no_grad()
def fill(model: nn.Module, path: str | Path, *, shapes: Shapes | None = None, lora: Lora = NO_LORA) -> None:
    """Load this rank's part of every weight from a safetensors file, and add its part of `lora`.

    Tensors of `lora` that replace weights are read instead of them. `shapes` are the shapes of the complete model, needed when other ranks
    have some of its blocks. A weight that is still on the meta device is mapped from the file, whose pages are read when used. Raises
    ValueError when the file is of another model.
    """
    shapes = shapes or shapes_of(model)
    lora.check(shapes)
    lora.check_base(Path(path))
    stored = stored_weights(path, shapes)
    for name, weight in model.named_parameters():
        if name not in shapes:
            continue
        if weight.is_meta:
            module, _, leaf = name.rpartition(".")
            mapped = _mapped(stored[name], weight, adapted=name in lora.adapters or name in lora.replaced)
            setattr(model.get_submodule(module), leaf, nn.Parameter(mapped, requires_grad=False))
            continue
        here = slice_of(weight)
        if here.local.numel():
            found = lora.replaced.get(name, stored[name]).part(here.index)
            if name in lora.adapters:
                found = found.to(here.local.dtype).float() + lora.adapters[name].delta(lora.alpha)[here.index]
            here.copy_from(found)


@torch.no_grad()
def fill_randomly(model: nn.Module, std: float = 0.02) -> None:
    """Fill the weights with random numbers, for measurements of memory and time; every rank uses the same seed for its own slices.

    Raises ValueError when weights are still on the meta device.
    """
    rng: dict[torch.device, torch.Generator] = {}
    for weight in model.parameters():
        if weight.is_meta:
            raise ValueError("offload.store=mmap needs weights in a file; use offload.store=pinned with random ones")
        heartbeat()
        local = slice_of(weight).local
        rng.setdefault(local.device, torch.Generator(local.device).manual_seed(0))
        local.normal_(std=std, generator=rng[local.device])


def _mapped(stored: StoredTensor, weight: Tensor, *, adapted: bool) -> Tensor:
    value = stored.whole()
    if value.dtype != weight.dtype or adapted:
        raise ValueError(
            f"offload.store=mmap uses weights {stored.file} as they lie on the disk, which are {value.dtype} and without lora; "
            f"this run needs {weight.dtype}{' with lora' if adapted else ''}: use offload.store=pinned"
        )
    return value


class WeightSlice(NamedTuple):
    """This rank's part of a weight: the elements `within` of the flattened block `index` of the unsharded weight. `local` is its memory."""

    local: Tensor
    index: tuple[slice, ...]
    within: slice = slice(None)

    def copy_from(self, found: Tensor) -> None:
        """Copy this part from `found`, the values of the block `index`."""
        self.local.copy_(found.flatten()[self.within].view(self.local.shape))


def shape_of(weight: Tensor) -> tuple[int, ...]:
    """The shape of the unsharded weight."""
    return tuple(getattr(weight, "ds_shape", weight.shape))


def slice_of(weight: Tensor) -> WeightSlice:
    """This rank's part of a weight: all of it, a slice along its first axis (FSDP), or a run of its elements (DeepSpeed).

    DeepSpeed cuts the flattened weight into runs of equal length, also in the middle of a row, and pads the last run.
    """
    if isinstance(weight, DTensor):
        shape, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
        return WeightSlice(weight.to_local(), tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True)))
    every = tuple(slice(0, size) for size in shape_of(weight))
    if not hasattr(weight, "ds_tensor"):
        return WeightSlice(weight.data, every)
    length, row = weight.ds_tensor.numel(), weight.ds_numel // every[0].stop
    start = min(dist.get_rank() * length, weight.ds_numel)
    stop = min(start + length, weight.ds_numel)
    rows = slice(start // row, -(-stop // row))
    run = slice(start - rows.start * row, stop - rows.start * row)
    return WeightSlice(weight.ds_tensor.data[: stop - start], (rows, *every[1:]), run)
