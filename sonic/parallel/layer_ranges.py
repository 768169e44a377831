"""The distribution of layers: contiguous ranges for the stages of a pipeline, and the layers that stay on an offloading device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf

Cost = Callable[[int, range], float]  # (stage, its blocks) -> seconds, or inf where it does not fit


def best_ranges(num_layers: int, stages: int, cost: Cost) -> list[range]:
    """The ranges that minimise the cost of the most expensive stage; a stage may be empty. An even split when no ranges fit."""
    table: list[list[tuple[float, tuple[range, ...]]]] = [[(0.0 if end == 0 else inf, ()) for end in range(num_layers + 1)]]
    for stage in range(stages):
        row = []
        for end in range(num_layers + 1):
            options = []
            for start in range(end + 1):
                before, ranges = table[-1][start]
                if before < inf:
                    options.append((max(before, cost(stage, range(start, end))), (*ranges, range(start, end))))
            row.append(min(options, key=lambda option: option[0], default=(inf, ())))
        table.append(row)
    value, found = table[-1][num_layers]
    if value < inf:
        return list(found)
    return ranges_of([num_layers // stages + (stage < num_layers % stages) for stage in range(stages)])


def ranges_of(sizes: Sequence[int]) -> list[range]:
    """Consecutive ranges of these sizes, from 0."""
    starts = [sum(sizes[:stage]) for stage in range(len(sizes))]
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def resident_layers(layers: int, number: int) -> list[int]:
    """The `number` layers that stay on an offloading device, spread evenly over all."""
    number = min(layers, number)
    return [index * layers // number for index in range(number)]
