"""Training objectives, one file each, and their table. An objective defines losses; devices and optimizers belong to the engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Protocol

import torch
from torch import Tensor, nn

Batch = Mapping[str, Tensor]
Losses = Iterator[tuple[Tensor, dict[str, Tensor]]]


class Objective(Protocol):
    """The modules to train, by role, and their losses.

    `roles` are the modules that have an optimizer ("student" is averaged and exported), `modules` all modules that compute,
    `pretrained` the transformers that start from the model's weights. `turn` lists the roles to update in a step. `losses` yields
    the loss in one or several parts, each with metrics to log, with all randomness from `rng`; each part is backpropagated before
    the next is computed, so that one graph is held at a time. `export` selects the weights to write from the student's averaged
    ones, and `metadata` goes into that file.
    """

    roles: Mapping[str, nn.Module]
    pretrained: Sequence[nn.Module] = ()
    metadata: Mapping[str, str] = {}
    rates: Mapping[str, float] = {}  # learning rates of roles as shares of optim.lr, where not 1

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """All modules that compute; by default the roles only."""
        return self.roles

    def turn(self, step: int) -> Sequence[str]:
        """The roles to update in a step, in order; by default the student."""
        return ("student",)

    def losses(self, role: str, batch: Batch, rng: torch.Generator) -> Losses: ...

    def export(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]: ...


def _from(module: str, name: str) -> Callable[..., Objective]:
    """A constructor of the class `name` of a sibling module, which is imported at the first call."""

    def build(*arguments: object, **keywords: object) -> Objective:
        return getattr(import_module(f"sonic.training.objectives.{module}"), name)(*arguments, **keywords)

    return build


TAKES_MAKE = (
    "flow_match",
    "consistency",
    "dmd",
)  # their constructors also take make= (which builds pretrained transformers) and execution=

# called as OBJECTIVES[name](config: TrainConfig, dataset), before the weights are moved to a device
OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "flow_match": _from("flow_match", "FlowMatch"),
    "viseme": _from("viseme", "VisemePretraining"),
    "autoencode": _from("autoencode", "Autoencode"),
    "portrait": _from("portrait_latents", "PortraitLatents"),
    "consistency": _from("consistency", "Consistency"),
    "dmd": _from("dmd", "DistributionMatching"),
}
