"""Distance of the videos of a sweep's cells from those of the teacher with the most sampling steps, for the same noise: what fewer
steps cost, and how much of it distillation recovers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sonic.checkpoint.bundled import TEACHER
from sonic.evaluation import metrics
from sonic.evaluation.sweep import Cell

STEPS, WEIGHTS = "sampler.sample_steps", "weights"
DISTANCE = "teacher_distance"
Rows = Sequence[tuple[Cell, dict[str, Any]]]  # cells and their metrics


def with_distances(rows: Rows) -> Rows:
    """The rows plus the metric `teacher_distance` {mean, ci95, clips} for cells whose teacher is in the grid.

    It is the root mean square difference of the mouth's opening in both videos, relative to the teacher's standard deviation.
    """
    found = []
    for cell, figures in rows:
        alike = [(other.choices, its) for other, its in rows if _but_weights_and_steps(other) == _but_weights_and_steps(cell)]
        teachers = [(choices[STEPS], its) for choices, its in alike if choices.get(WEIGHTS) == TEACHER and STEPS in choices]
        if teachers:
            _, teacher = max(teachers, key=lambda pair: pair[0])
            pairs = zip(figures["openings"], teacher["openings"], strict=True)
            figures = {**figures, DISTANCE: metrics.mean_and_interval([metrics.track_distance(np.array(a), np.array(b)) for a, b in pairs])}
        found.append((cell, figures))
    return found


def _but_weights_and_steps(cell: Cell) -> dict[str, Any]:
    return {option: value for option, value in cell.choices.items() if option not in (STEPS, WEIGHTS)}
