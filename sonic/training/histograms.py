"""Histograms of the gradients and weights of a role, for W&B and TensorBoard."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sonic.training.optim import local_part

BINS = 64


class Histogram(NamedTuple):
    """Numbers of values in bins of equal width, int64 [BINS], and the bins' edges [BINS + 1]."""

    counts: np.ndarray
    edges: np.ndarray


def histograms(role: str, module: nn.Module) -> dict[str, Histogram]:
    """Histograms of every trainable parameter and its gradient; of a sharded one, of this process's part. The host waits for each."""
    found = {}
    for name, parameter in module.named_parameters():
        for kind, values in (("weights", parameter), ("gradients", parameter.grad)):
            if parameter.requires_grad and values is not None and local_part(values).numel():
                found[f"{role}/{kind}/{name}"] = histogram(local_part(values.detach()))
    return found


def histogram(values: Tensor) -> Histogram:
    """The histogram of the finite values of a tensor, from the least to the greatest."""
    finite = values.float()[values.isfinite()]
    low, high = map(float, finite.aminmax()) if finite.numel() else (0.0, 0.0)
    high = high if high > low else low + 1e-6 * max(1.0, abs(low))
    return Histogram(torch.histc(finite, BINS, low, high).long().cpu().numpy(), np.linspace(low, high, BINS + 1))
