"""Which blocks go where: contiguous ranges for the stages of a pipeline, as even as they can be, and those that stay on a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf

Cost = Callable[[int, range], float]  # (stage, its blocks) -> seconds, or inf where it does not fit


def best_ranges(num_layers: int, stages: int, cost: Cost) -> list[range]:
    """The ranges whose dearest stage is the cheapest; a stage may be empty. Everything is inf: an even split."""
    reach: list[list[tuple[float, tuple[range, ...]]]] = [[(0.0 if end == 0 else inf, ()) for end in range(num_layers + 1)]]
    for stage in range(stages):
        row = []
        for end in range(num_layers + 1):
            options = []
            for start in range(end + 1):
                before, ranges = reach[-1][start]
                if before < inf:
                    options.append((max(before, cost(stage, range(start, end))), (*ranges, range(start, end))))
            row.append(min(options, key=lambda option: option[0], default=(inf, ())))
        reach.append(row)
    value, found = reach[-1][num_layers]
    return list(found) if value < inf else even_ranges(num_layers, stages)


def even_ranges(num_layers: int, stages: int) -> list[range]:
    """Ranges that differ by one block at most, the longer ones first."""
    return ranges_of([num_layers // stages + (stage < num_layers % stages) for stage in range(stages)])


def ranges_of(sizes: Sequence[int]) -> list[range]:
    """Ranges of these sizes, one after the other."""
    starts = [sum(sizes[:stage]) for stage in range(len(sizes))]
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def resident_layers(layers: int, number: int) -> list[int]:
    """Which layers stay on an offloading device, spread evenly."""
    number = min(layers, number)
    return [index * layers // number for index in range(number)]
