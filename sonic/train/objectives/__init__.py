"""What can be learnt: one file per objective and their table. An objective knows losses, not devices or optimizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Protocol

import torch
from torch import Tensor, nn

Batch = Mapping[str, Tensor]


class Objective(Protocol):
    """Roles to train and their losses.

    `roles` names the modules that have an optimizer ("student" is averaged and exported); `turn` says which of them
    learn at a step; `loss` gives the scalar to descend and figures to log, with all randomness from `rng`;
    `export` picks from the averaged weights of the student what goes into the file.
    """

    roles: Mapping[str, nn.Module]

    def turn(self, step: int) -> Sequence[str]: ...

    def loss(self, role: str, batch: Batch, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]: ...

    def export(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]: ...


def _from(module: str, name: str) -> Callable[..., Objective]:
    """The objective `name` of a file beside this one, imported when it is built."""

    def build(*arguments: object, **keywords: object) -> Objective:
        return getattr(import_module(f"sonic.train.objectives.{module}"), name)(*arguments, **keywords)

    return build


# each is called as OBJECTIVES[name](config: TrainConfig, dataset) before the weights move to their device
OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "flow_match": _from("flow_match", "FlowMatch"),
    "viseme": _from("viseme", "VisemePretraining"),
    "autoencode": _from("autoencode", "Autoencode"),
    "portrait": _from("portrait", "PortraitLatents"),
}
