"""How far the films of a sweep's cells are from their teacher's of most steps, begun from the same noise: what fewer steps cost,
and what learning to take them bought."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sonic.evaluation import metrics
from sonic.inference.components import TEACHER

STEPS, WEIGHTS = "sampler.sample_steps", "weights"
DISTANCE = "teacher_distance"
Figures = dict[str, Any]


def with_distances(cells: Sequence[tuple[Mapping[str, Any], Figures]]) -> list[Figures]:
    """The figures of cells (choices, figures) with `teacher_distance` {mean, ci95, clips} where the grid holds a teacher.

    It is the root mean square difference between the mouth's opening in both films, as a share of how much the teacher's moves.
    """
    found = []
    for choices, figures in cells:
        teacher = _teacher_of(choices, cells)
        clips = [] if teacher is None else _distances(figures["openings"], teacher["openings"])
        found.append({**figures, DISTANCE: metrics.interval(clips)} if clips else figures)
    return found


def _teacher_of(choices: Mapping[str, Any], cells: Sequence[tuple[Mapping[str, Any], Figures]]) -> Figures | None:
    """The cell of the teacher that differs in nothing but its steps, of which it takes most."""
    alike = lambda other: all(other[knob] == choices[knob] for knob in choices if knob not in (STEPS, WEIGHTS))  # noqa: E731
    teachers = [(other[STEPS], figures) for other, figures in cells if other.get(WEIGHTS) == TEACHER and STEPS in other and alike(other)]
    return max(teachers, key=lambda pair: pair[0])[1] if teachers else None


def _distances(openings: Sequence[Sequence[float]], teacher: Sequence[Sequence[float]]) -> list[float]:
    """Clip by clip; nothing where a cell kept from an earlier sweep has other clips."""
    if [len(track) for track in openings] != [len(track) for track in teacher]:
        return []
    return [metrics.track_distance(np.array(mine), np.array(its)) for mine, its in zip(openings, teacher, strict=True)]
