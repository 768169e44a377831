"""A running average of parameters: what is exported and evaluated."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Ema:
    """Averages of what learns in a module, kept in float32; everything else is copied as it is."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.averages = {name: p.detach().float().clone() for name, p in module.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move towards `module` after `step` (from 0). Early on the average is short, so that the start is forgotten."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, live in module.named_parameters():
            if name in self.averages:
                self.averages[name].mul_(decay).add_(live.detach(), alpha=1 - decay)

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        """The module's state with its parameters replaced by their averages."""
        return {name: self.averages.get(name, value) for name, value in module.state_dict().items()}

    def state(self) -> dict[str, Tensor]:
        return dict(self.averages)

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        for name, average in self.averages.items():
            average.copy_(state[name])
