"""Divergence check: a loss that is not finite, or far above its recent values, ends a run before a checkpoint is overwritten."""

from __future__ import annotations

import math

FAR = 100.0  # a loss above so many times its running mean has exploded
MEMORY = 0.95  # decay of the running mean
WARM = 20  # updates of a role before its losses are checked


class Guard:
    """Running mean of each role's loss. Not saved in checkpoints, since it does not affect the training itself."""

    def __init__(self) -> None:
        self._usual: dict[str, tuple[int, float]] = {}  # by role: number of updates, and running mean

    def fault(self, role: str, loss: float, norm: float) -> str:
        """What is wrong with a loss and the norm of its gradient; empty when nothing is."""
        if not math.isfinite(loss + norm):
            return "is not finite"
        updates, usual = self._usual.get(role, (0, 0.0))
        if updates >= WARM and abs(loss) > FAR * usual:
            return f"exploded from {usual:.4g}"
        share = min(MEMORY, updates / (updates + 1))
        self._usual[role] = updates + 1, share * usual + (1 - share) * abs(loss)
        return ""
