"""Training objectives, one file each, and their table. An objective defines losses; devices and optimizers belong to the engines."""

from __future__ import annotations

from sonic.training.objectives.autoencode import Autoencode
from sonic.training.objectives.consistency import Consistency
from sonic.training.objectives.dmd import DistributionMatching
from sonic.training.objectives.flow_match import FlowMatch
from sonic.training.objectives.objective import Batch as Batch
from sonic.training.objectives.objective import Losses as Losses
from sonic.training.objectives.objective import Objective
from sonic.training.objectives.portrait_latents import PortraitLatents
from sonic.training.objectives.viseme import VisemePretraining

OBJECTIVES: dict[str, type[Objective]] = {
    "flow_match": FlowMatch,
    "consistency": Consistency,
    "dmd": DistributionMatching,
    "viseme": VisemePretraining,
    "autoencode": Autoencode,
    "portrait": PortraitLatents,
}
