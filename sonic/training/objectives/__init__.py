"""Training objectives, one file each, and their table. An objective defines losses; devices and optimizers belong to the engines."""

from __future__ import annotations

from sonic.registry import Registry, require
from sonic.training.objective_config import OBJECTIVE_CONFIGS
from sonic.training.objectives.autoencode import Autoencode
from sonic.training.objectives.consistency import Consistency
from sonic.training.objectives.dmd import DistributionMatching
from sonic.training.objectives.flow_match import FlowMatch
from sonic.training.objectives.objective import Batch as Batch
from sonic.training.objectives.objective import Losses as Losses
from sonic.training.objectives.objective import Objective
from sonic.training.objectives.portrait_latents import PortraitLatents
from sonic.training.objectives.svd_audio import SvdAudio
from sonic.training.objectives.svd_consistency import SvdConsistency
from sonic.training.objectives.viseme import VisemePretraining


class Objectives(Registry[type[Objective]]):
    """The objectives by name. One that is added brings its options along, which must have its name."""

    def __setitem__(self, name: str, objective: type[Objective]) -> None:
        options = objective.options
        require(options.name == name, f'{self.option}={name}: the options {options.__name__} need the line name: str = "{name}"')
        OBJECTIVE_CONFIGS[name] = options
        super().__setitem__(name, objective)


_ALL = (FlowMatch, Consistency, DistributionMatching, VisemePretraining, Autoencode, PortraitLatents, SvdAudio, SvdConsistency)
OBJECTIVES = Objectives("objective", {objective.options.name: objective for objective in _ALL})
