"""The optimizer, its learning rate schedule, and the exponential moving average of the weights, which is what is exported."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sonic.training.train_config import OptimConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


def is_cuda(tensor: Tensor) -> bool:
    """Whether a tensor, or this process's shard of it, is on a CUDA device."""
    return tensor.device.type == "cuda"


def local_part(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor, in the same memory; the tensor itself when it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def adamw(parameters: Iterable[nn.Parameter], config: OptimConfig, *, fuse: Callable[[Tensor], bool] = is_cuda) -> torch.optim.AdamW:
    """AdamW over `parameters`, with weight decay on matrices but not on vectors and scalars (biases, gains).

    Parameters for which `fuse` is true are updated by one kernel, the others by one call for each operation.
    """
    kinds: dict[tuple[bool, type, bool], list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.requires_grad:  # sharded and unsharded ones cannot be in one group
            kinds.setdefault((parameter.ndim >= 2, type(parameter.data), fuse(parameter)), []).append(parameter)
    groups = [
        {"params": group, "weight_decay": config.weight_decay if decays else 0.0, "fused": fused, "foreach": not fused}
        for (decays, _, fused), group in kinds.items()
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2))


def adam_state(parameter: Tensor) -> dict[str, Tensor]:
    """What AdamW itself allocates for a parameter in its first step; where it is fused, it counts the steps on the device."""
    step = torch.zeros((), device=parameter.device if is_cuda(parameter) else "cpu")
    return {"step": step, **{key: torch.zeros_like(parameter).detach() for key in MOMENTS}}


def rate(step: int, progress: float, config: OptimConfig) -> float:
    """Learning rate of `step` (from 0) at `progress` in [0, 1] of the budget."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    fall = max(0.0, (progress - config.decay_from) / (1 - config.decay_from))
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, fall)))
    return config.lr * warm * (config.final_lr + (1 - config.final_lr) * cosine)


class Ema:
    """Moving averages, in float32, of trainable parameters."""

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        self.averages = {name: parameter.detach().float().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the averages after `step` (from 0). The decay is smaller in the first steps, so that the start does not persist."""
        decay = min(self.decay, (1 + step) / (10 + step))
        parameters = [local_part(self.parameters[name].detach()).float() for name in self.averages]
        torch._foreach_lerp_([local_part(average) for average in self.averages.values()], parameters, 1 - decay)
