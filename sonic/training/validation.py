"""Validation: the student's loss by noise level on clips that are held out of the training. Training is not affected."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.data import default_collate

from sonic.data.clips import ClipDataset
from sonic.sampling.path import interpolate
from sonic.training.objectives.flow_match import split_past
from sonic.training.objectives.transformer import TransformerObjective, conditions_of
from sonic.training.samples import Student
from sonic.types import upload

LOG = logging.getLogger(__name__)
SIGMAS = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
MOST_CLIPS = 32  # that a validation reads, evenly spread over those held out

Validate = Callable[[], dict[str, float]]  # collective: every process must call it


def validator(student: Student) -> Validate | None:
    """The function that gives the loss on held-out clips at each of SIGMAS; None with data.validation_share=0, or when no video is held
    out. The windows and the noise are the same at every call and on any number of processes.

    Raises ValueError when the objective trains no transformer."""
    config, objective, world = student.config, student.objective, student.engine.world
    data = config.data
    if not data.validation_share:
        return None
    if not isinstance(objective, TransformerObjective):
        raise ValueError(f"data.validation_share={data.validation_share} is for objectives that denoise latents; use 0")
    clips = ClipDataset(data.folder, data.window, share=data.validation_share, held_out=True)
    if not clips.clips:
        LOG.warning(
            "data.validation_share=%g can hold out no video of %s, which has too few; there is no validation",
            data.validation_share,
            data.folder,
        )
        return None
    count = min(MOST_CLIPS, len(clips))
    ranks, rank = world.data_ranks, world.data_rank  # of those that have clips of their own

    def validate() -> dict[str, float]:
        totals = torch.zeros(len(SIGMAS) + 1)  # of the losses, and the number of clips
        with student.use_role() as model:
            for first in range(0, count, ranks):  # sharded processes make as many forwards as the others
                number = min(first + rank, count - 1)
                batch = default_collate([clips.read(number * len(clips) // count, number)])
                batch = {name: upload(tensor, world.device) for name, tensor in batch.items()}
                with student.engine.precision():
                    losses = losses_by_sigma(objective, model, batch, rng=torch.Generator(world.device).manual_seed(number))
                totals += torch.cat((losses.cpu(), torch.ones(1))) * (first + rank < count)
        *losses, clips_used = world.mean(totals).tolist()
        return {f"eval/validation_loss_sigma_{sigma}": loss / clips_used for sigma, loss in zip(SIGMAS, losses, strict=True)}

    return validate


def losses_by_sigma(objective: TransformerObjective, model: torch.nn.Module, batch: dict[str, Tensor], *, rng: torch.Generator) -> Tensor:
    """The objective's error of the model's prediction for one noise, at each of SIGMAS, with all conditions.  -> [len(SIGMAS)]"""
    batch, motion = split_past(batch, objective.config.window, rng)
    clean = batch["latents"]
    conditions = replace(conditions_of(batch, objective.model_config), motion=motion)
    noise = torch.randn(clean.shape, generator=rng, device=rng.device)
    losses = []
    for level in SIGMAS:
        sigma = torch.full(clean.shape[:1], level, device=clean.device)
        prediction = objective.predict(model, interpolate(clean, noise, sigma), sigma, conditions=conditions, first_block=0)
        losses.append(objective.error(prediction, clean, noise, sigma=sigma)[0])
    return torch.stack(losses).float()
