"""Validation: the student's loss by noise level on clips that are held out of the training. Training is not affected."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch.utils.data import default_collate

from sonic.data.clips import ClipDataset
from sonic.training.samples import Student
from sonic.types import upload

LOG = logging.getLogger(__name__)
MOST_CLIPS = 32  # that a validation reads, evenly spread over those held out

Validate = Callable[[], dict[str, float]]  # collective: every process must call it


def validator(student: Student) -> Validate | None:
    """The function that gives the loss on held-out clips at each of the objective's noise levels; None with data.validation_share=0, or
    when no video is held out. The windows and the noise are the same at every call and on any number of processes.

    Raises ValueError when the objective denoises no latents."""
    config, objective, world = student.config, student.objective, student.engine.world
    data = config.data
    if not data.validation_share:
        return None
    if not (levels := objective.validation_levels):
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
        totals = torch.zeros(len(levels) + 1)  # of the losses, and the number of clips
        with student.use_role() as model:
            for first in range(0, count, ranks):  # sharded processes make as many forwards as the others
                number = min(first + rank, count - 1)
                batch = default_collate([clips.read(number * len(clips) // count, number)])
                batch = {name: upload(tensor, world.device) for name, tensor in batch.items()}
                with student.engine.precision():
                    losses = objective.validation_losses(model, batch, torch.Generator(world.device).manual_seed(number))
                totals += torch.cat((losses.cpu(), torch.ones(1))) * (first + rank < count)
        *losses, clips_used = world.mean(totals).tolist()
        return {f"eval/validation_loss_sigma_{sigma}": loss / clips_used for sigma, loss in zip(levels, losses, strict=True)}

    return validate
