"""Exponential moving average of parameters, which is what is exported."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Ema:
    """Moving averages, in float32, of the trainable parameters of a module; all other tensors are taken from the module."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.averages = {name: p.detach().float().clone() for name, p in module.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Update the averages after `step` (from 0). The decay is smaller in the first steps, so that the start does not persist."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, live in module.named_parameters():
            if name in self.averages:
                self.averages[name].mul_(decay).add_(live.detach(), alpha=1 - decay)

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        """The module's state dict with the trained parameters replaced by their averages."""
        return {name: self.averages.get(name, value) for name, value in module.state_dict().items()}

    def state(self) -> dict[str, Tensor]:
        return dict(self.averages)

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        for name, average in self.averages.items():
            average.copy_(state[name])
