"""The optimizer and its learning rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from sonic.training.train_config import OptimConfig


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


def rate(step: int, progress: float, config: OptimConfig) -> float:
    """Learning rate of `step` (from 0) at `progress` in [0, 1] of the budget."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    fall = max(0.0, (progress - config.decay_from) / (1 - config.decay_from))
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, fall)))
    return config.lr * warm * (config.final_lr + (1 - config.final_lr) * cosine)
