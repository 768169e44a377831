"""Distance of the videos of a sweep's cells from those of the teacher with the most sampling steps, for the same noise: what fewer
steps cost, and how much of it distillation recovers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sonic.checkpoint.bundled import TEACHER
from sonic.evaluation import metrics

STEPS, WEIGHTS = "sampler.sample_steps", "weights"
DISTANCE = "teacher_distance"
Figures = dict[str, Any]


def with_distances(cells: Sequence[tuple[Mapping[str, Any], Figures]]) -> list[Figures]:
    """The metrics of cells (choices, metrics) plus `teacher_distance` {mean, ci95, clips} for cells whose teacher is in the grid.

    It is the root mean square difference of the mouth's opening in both videos, relative to the teacher's standard deviation.
    """
    found = []
    for choices, figures in cells:
        teacher = _teacher_of(choices, cells)
        clips = [] if teacher is None else _distances(figures["openings"], teacher["openings"])
        found.append({**figures, DISTANCE: metrics.interval(clips)} if clips else figures)
    return found


def _teacher_of(choices: Mapping[str, Any], cells: Sequence[tuple[Mapping[str, Any], Figures]]) -> Figures | None:
    """The teacher's cell with the most steps among those that differ only in weights and steps."""
    alike = lambda other: all(other[option] == choices[option] for option in choices if option not in (STEPS, WEIGHTS))  # noqa: E731
    teachers = [(other[STEPS], figures) for other, figures in cells if other.get(WEIGHTS) == TEACHER and STEPS in other and alike(other)]
    return max(teachers, key=lambda pair: pair[0])[1] if teachers else None


def _distances(openings: Sequence[Sequence[float]], teacher: Sequence[Sequence[float]]) -> list[float]:
    """Distance of each clip; [] when the two cells have different clips, as one of an earlier sweep may."""
    if [len(track) for track in openings] != [len(track) for track in teacher]:
        return []
    return [metrics.track_distance(np.array(mine), np.array(its)) for mine, its in zip(openings, teacher, strict=True)]
