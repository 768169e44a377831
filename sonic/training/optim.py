"""The optimizer, its learning rate schedule, and the exponential moving average of the weights, which is what is exported."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from sonic.training.train_config import OptimConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


def adamw(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over `parameters`, with weight decay on matrices but not on vectors and scalars (biases, gains)."""
    kinds: dict[tuple[bool, type], list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.requires_grad:
            kinds.setdefault((parameter.ndim >= 2, type(parameter.data)), []).append(parameter)  # not sharded with unsharded
    return torch.optim.AdamW(
        [{"params": group, "weight_decay": config.weight_decay if decays else 0.0} for (decays, _), group in kinds.items()],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        fused=False,
        foreach=True,
    )


def adam_state(parameter: Tensor) -> dict[str, Tensor]:
    """What AdamW itself allocates for a parameter in its first step."""
    return {"step": torch.zeros(()), **{key: torch.zeros_like(parameter).detach() for key in MOMENTS}}


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
        for name, average in self.averages.items():
            average.mul_(decay).add_(self.parameters[name].detach(), alpha=1 - decay)
