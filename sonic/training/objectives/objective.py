"""The base of all training objectives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from sonic.checkpoint.load import fill
from sonic.checkpoint.lora import Lora
from sonic.config import ModelConfig
from sonic.model.dit import AvatarDiT
from sonic.model.execution import LOCAL, Execution
from sonic.training.objective_config import ObjectiveConfig
from sonic.training.objectives.networks import STUDENT, Make
from sonic.training.train_config import TrainConfig

Batch = Mapping[str, Tensor]


class Weighted(NamedTuple):
    """A figure of some of the samples, such as those of a noise level: its sum over them and their number. Without any it is not logged."""

    total: Tensor
    weight: Tensor


Figure = Tensor | Weighted
Losses = Iterator[tuple[Tensor, Mapping[str, Figure]]]


def host_rng(rng: torch.Generator) -> torch.Generator:
    """The generator of what the program itself must know, such as a number of steps: drawn on the device, it would have to wait for it.

    On the CPU it is `rng`; else make it once per loss, since it always starts from the seed of `rng`.
    """
    return rng if rng.device.type == "cpu" else torch.Generator().manual_seed(rng.initial_seed())


class Objective:
    """The modules to train, by role, and their losses.

    `options` is the class of its options. `roles` are the modules that have an optimizer (the student is averaged and exported),
    `pretrained` the transformers that start from the model's weights, `metadata` goes into the exported file, which with
    `exports_changes` holds changes of the model's weights. Validations measure the loss at each of `validation_levels`.
    """

    options: ClassVar[type[ObjectiveConfig]] = ObjectiveConfig
    roles: Mapping[str, nn.Module]
    pretrained: Sequence[nn.Module] = ()
    metadata: Mapping[str, str] = {}
    rates: Mapping[str, float] = {}  # learning rates of roles as shares of optim.lr, where not 1
    exports_changes = False
    keeps_changes = False  # whether changes that the model's weights already have (model.lora.path) are exported too
    makes_videos = False  # whether sample videos of the student can be made
    validation_levels: Sequence[float] = ()  # noise levels
    exported = ""  # beginning of the names of the student's weights that are exported, and not part of their exported names

    def __init__(self, config: TrainConfig, dataset: object = None, *, make: Make | None = None, execution: Execution = LOCAL) -> None:
        """Build the modules in host memory. `make` builds a pretrained `network`, maybe without memory; `execution` runs it."""
        self.config, self.model_config, self.execution = config.objective, config.model, execution
        self.make = make or self.network
        self.build(config, dataset)

    def build(self, config: TrainConfig, dataset: object) -> None:
        """Set `roles`, and what else the objective has of its own."""

    @staticmethod
    def network(config: ModelConfig) -> nn.Module:
        """The network that is trained, in host memory."""
        return AvatarDiT(config)

    def load(self, weights: Path, lora: Lora) -> None:
        """Fill the pretrained networks from the model's weights, changed by `lora`."""
        for model in self.pretrained:
            fill(model, weights, lora=lora)

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """All modules that compute; by default the roles only."""
        return self.roles

    def roles_in_step(self, step: int) -> Sequence[str]:
        """The roles to update in a step, in order; by default the student."""
        return (STUDENT,)

    def losses(self, role: str, batch: Batch, rng: torch.Generator) -> Losses:
        """The loss in one or several parts, each with metrics to log, with all randomness from `rng`.

        A metric is logged under the role, unless its name has one, as in "teacher/score_rms"; the last part's are logged.
        Each part is backpropagated before the next is computed, so that one graph is held at a time.
        """

    def validation_losses(self, model: nn.Module, batch: Batch, rng: torch.Generator) -> Tensor:
        """The loss of the student's prediction for one noise, at each of `validation_levels`.  -> [levels]"""

    def exports(self, name: str) -> bool:
        """Whether a weight of the student is written."""
        return name.startswith(self.exported)

    def export(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of the student's weights that are written, by their names in the file."""
        return {name.removeprefix(self.exported): tensor for name, tensor in weights.items() if self.exports(name)}
