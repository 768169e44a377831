"""What can be learnt: one file per objective and their table. An objective knows losses, not devices or optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Protocol

import torch
from torch import Tensor, nn

Batch = Mapping[str, Tensor]
Losses = Iterator[tuple[Tensor, dict[str, Tensor]]]


class Objective(Protocol):
    """Roles to train and their losses.

    `roles` names the modules that have an optimizer ("student" is averaged and exported), `bodies` the modules that they are
    parts of or that compute beside them, `pretrained` the transformers that begin as the model's weights. `turn` says which
    roles learn at a step. `losses` gives the scalar to descend in one or several parts, with figures to log, all randomness
    from `rng`; the gradient of a part is taken before the next is asked for, so that one graph at a time is held. `export`
    picks from the averaged weights of the student what goes into the file, and `facts` what the file says of itself.
    """

    roles: Mapping[str, nn.Module]
    pretrained: Sequence[nn.Module] = ()
    facts: Mapping[str, str] = {}
    rates: Mapping[str, float] = {}  # learning rates of roles as shares of optim.lr, where not 1

    @property
    def bodies(self) -> Mapping[str, nn.Module]:
        """The roles themselves, where nothing computes beside them."""
        return self.roles

    def turn(self, step: int) -> Sequence[str]:
        """One role, always."""
        return ("student",)

    def losses(self, role: str, batch: Batch, rng: torch.Generator) -> Losses: ...

    def export(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]: ...


def _from(module: str, name: str) -> Callable[..., Objective]:
    """The objective `name` of a file beside this one, imported when it is built."""

    def build(*arguments: object, **keywords: object) -> Objective:
        return getattr(import_module(f"sonic.training.objectives.{module}"), name)(*arguments, **keywords)

    return build


CASTING = (
    "flow_match",
    "consistency",
    "dmd",
)  # take make= (of transformers that begin as the model's weights) and execution= too

# each is called as OBJECTIVES[name](config: TrainConfig, dataset) before the weights move to their device
OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "flow_match": _from("flow_match", "FlowMatch"),
    "viseme": _from("viseme", "VisemePretraining"),
    "autoencode": _from("autoencode", "Autoencode"),
    "portrait": _from("portrait", "PortraitLatents"),
    "consistency": _from("consistency", "Consistency"),
    "dmd": _from("dmd", "DistributionMatching"),
}
