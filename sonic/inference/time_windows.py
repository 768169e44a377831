"""Windows over the frames of a stream, and the weights with which frames are filtered and interpolated over time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np
from scipy.signal import firwin

T = TypeVar("T")

JITTER_HZ = 7.0  # motion above this is taken for jitter: most of speech is slower, and lips still close for m, b and p
TAPS = 7  # frames that the smoothing weights cover, so that a stream is delayed by three


def smoothing_weights(strength: float, fps: float) -> np.ndarray:
    """Weights of TAPS frames that leave slow motion as it is and take out the share `strength` of what is faster than JITTER_HZ."""
    weights = strength * firwin(TAPS, JITTER_HZ, window=("kaiser", 2.0), fs=fps)
    weights[TAPS // 2] += 1 - strength
    return weights


def windows(chunks: Iterable[Iterable[T]], radius: int) -> Iterator[list[tuple[T, ...]]]:
    """For every frame, that frame between the `radius` frames before and those after it; the first and the last one are repeated.

    The windows that a chunk completes come together, and none depends on how the frames are cut into chunks.
    """
    held: deque[T] = deque(maxlen=2 * radius + 1)

    def completed(frames: Iterable[T]) -> Iterator[tuple[T, ...]]:
        for frame in frames:
            held.extend([frame] * (1 if held else radius + 1))
            if len(held) == held.maxlen:
                yield tuple(held)

    for chunk in chunks:
        if group := list(completed(chunk)):
            yield group
    if group := list(completed([held[-1]] * radius if held else ())):
        yield group
