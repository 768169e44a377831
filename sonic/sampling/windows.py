"""Windows of frames that are denoised together, moved from step to step, and which process evaluates which of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sonic.config import UNetConfig

if TYPE_CHECKING:
    from torch import Tensor

CACHED_FRAMES = 250  # longest clip whose audio keys and values are kept: in a longer one they would take more memory than they save time


def windows_of(frames: int, step: int, unet: UNetConfig) -> list[list[int]]:
    """The frames of each window of a sampling step. The clip is a ring: windows that pass its end go on at its beginning.

    Every step moves all windows by `window_shift` frames towards the beginning. A clip shorter than a window is in it several times.
    """
    stride = unet.window_frames - unet.window_overlap
    first = -step * unet.window_shift
    return [[(start + first + position) % frames for position in range(unet.window_frames)] for start in range(0, frames, stride)]


class Spread:
    """Which windows of a step this process evaluates: all of them. Several processes divide them among each other."""

    def mine(self, windows: int) -> list[int]:
        """The numbers of the windows that this process evaluates in a step, some twice where that gives all processes equally many."""
        return list(range(windows))

    def exchange(self, own: list[Tensor]) -> list[Tensor]:
        """The results of all windows of the step in order, from those of `mine`."""
        return own


ALONE = Spread()
