"""Distance of the videos of a sweep's cells from those of their teacher with the most sampling steps, for the same noise: what fewer
steps cost, and how much of it distillation recovers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sonic.checkpoint.bundled import IN_PACKAGE, STUDENT, TEACHER
from sonic.checkpoint.header import read_header
from sonic.evaluation import metrics
from sonic.evaluation.sweep import Cell

STEPS, WEIGHTS = "sampler.sample_steps", "weights"
DISTANCE = "teacher_distance"
Rows = Sequence[tuple[Cell, dict[str, Any]]]  # cells and their metrics


def with_distances(rows: Rows) -> Rows:
    """The rows plus the metric `teacher_distance` {mean, ci95, clips} for cells whose teacher is in the grid, and the `objective` and the
    `training_minutes` of weights whose file says them.

    The distance is the root mean square difference of the mouth's opening in both videos, relative to the teacher's standard deviation.
    The teacher is weights=teacher or a file of weights that were not distilled: where there are several, the one that a cell's adapters
    are for.
    """
    found = []
    for cell, figures in rows:
        alike = [(other.choices, its) for other, its in rows if _but_weights_and_steps(other) == _but_weights_and_steps(cell)]
        teachers = [(choices, its) for choices, its in alike if STEPS in choices and _teaches(choices.get(WEIGHTS, ""))]
        own = _teacher_of(cell.choices.get(WEIGHTS, ""))
        teachers = [each for each in teachers if _teacher_of(each[0][WEIGHTS]) == own] or teachers
        if header := read_header(cell.choices.get(WEIGHTS, "")):
            figures = {**figures, "objective": header.objective, "training_minutes": header.minutes}
        if teachers:
            _, teacher = max(teachers, key=lambda pair: pair[0][STEPS])
            pairs = zip(figures["openings"], teacher["openings"], strict=True)
            figures = {**figures, DISTANCE: metrics.mean_and_interval([metrics.track_distance(np.array(a), np.array(b)) for a, b in pairs])}
        found.append((cell, figures))
    return found


def _teaches(weights: str) -> bool:
    """Whether weights were not distilled for a number of sampling steps."""
    header = read_header(weights)
    return weights == TEACHER or (Path(weights).is_file() and not (header and header.sampler))


def _teacher_of(weights: str) -> str:
    """The weights that adapters are for; whole weights are their own teacher."""
    header = read_header(weights)
    if weights in (STUDENT, TEACHER) or (header and header.base.startswith(IN_PACKAGE)):
        return TEACHER
    return os.path.abspath(os.path.join(os.path.dirname(weights), header.base) if header and header.base else weights)


def _but_weights_and_steps(cell: Cell) -> dict[str, Any]:
    return {option: value for option, value in cell.choices.items() if option not in (STEPS, WEIGHTS)}
