"""Loading of weights into a model that was built on the meta device and sharded: each rank reads only its own slices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from sonic.checkpoint.weights import LazyTensor, stored_weights
from sonic.config import ModelConfig
from sonic.model.dit import AvatarDiT
from sonic.model.lora import Adapter, check_lora
from sonic.system.heartbeat import heartbeat

Shapes = Mapping[str, Sequence[int]]


class Lora(NamedTuple):
    """Adapters by the names of the weights that they change, and the alpha that they were trained with."""

    adapters: Mapping[str, Adapter]
    alpha: float


def without_memory(config: ModelConfig, dtype: torch.dtype) -> tuple[AvatarDiT, Shapes]:
    """The model on the meta device, and the shapes of all its weights before it is sharded."""
    with torch.device("meta"):
        model = AvatarDiT(config).to(dtype).eval().requires_grad_(False)
    return model, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@torch.no_grad()
def fill(model: nn.Module, path: str | Path, shapes: Shapes, *, lora: Lora) -> None:
    """Read this rank's part of every weight from a safetensors file, and add its part of the adapters.

    Weights that are still on the meta device become memory maps of the file, whose pages are read when they are used.
    """
    check_lora(shapes, lora.adapters)
    with stored_weights(path, shapes) as stored:
        for name, weight in model.named_parameters():
            if weight.is_meta:
                weight_of(model, name, _mapped(stored[name], weight, path, adapted=name in lora.adapters))
                continue
            local, index, within = _local(weight)
            if not local.numel():
                continue
            part = stored[name].part(index)
            if name in lora.adapters:
                part = part.to(local.dtype).float() + lora.adapters[name].delta(lora.alpha)[index]
            local.copy_(part.flatten()[within].view(local.shape))


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
        local, _, _ = _local(weight)
        rng.setdefault(local.device, torch.Generator(local.device).manual_seed(0))
        local.normal_(std=std, generator=rng[local.device])


def weight_of(model: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter of the model by `value`."""
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, nn.Parameter(value, requires_grad=False))


def _mapped(stored: LazyTensor, weight: Tensor, path: str | Path, *, adapted: bool) -> Tensor:
    value = stored.view()
    if value.dtype != weight.dtype or adapted:
        raise ValueError(
            f"offload.store=mmap uses weights {path} as they lie on the disk, which are {value.dtype} and without lora; "
            f"this run needs {weight.dtype}{' with lora' if adapted else ''}: use offload.store=pinned"
        )
    return value


def _local(weight: Tensor) -> tuple[Tensor, tuple[slice, ...], slice]:
    """This rank's part of a weight, the slice of the whole weight that contains it, and its range in that slice when flattened."""
    if hasattr(weight, "ds_tensor"):
        return _local_of_deepspeed(weight)
    if not isinstance(weight, DTensor):
        return weight.data, tuple(slice(0, size) for size in weight.shape), slice(None)
    shape, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    index = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
    return weight.to_local(), index, slice(None)


def _local_of_deepspeed(weight: Tensor) -> tuple[Tensor, tuple[slice, ...], slice]:
    """`_local` of a weight that DeepSpeed sharded: it cuts the flattened weight into runs of equal length, the last one padded."""
    length, (rows, *rest) = weight.ds_tensor.numel(), weight.ds_shape
    start = min(dist.get_rank() * length, weight.ds_numel)
    stop = min(start + length, weight.ds_numel)
    row = math.prod(rest)
    first, last = start // row, min(rows, -(-stop // row))
    index = (slice(first, last), *(slice(0, size) for size in rest))
    return weight.ds_tensor[: stop - start], index, slice(start - first * row, stop - first * row)
