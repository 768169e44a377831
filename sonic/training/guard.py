"""Watches losses: one that is no number, or far beyond what it has been, ends a run before it spoils its checkpoints."""

from __future__ import annotations

import math

FAR = 100.0  # times what a loss has been lately
MEMORY = 0.95  # share of the past in what it has been
WARM = 20  # turns of a role before anything counts as usual


class Guard:
    """What the losses of each role have been; not part of a checkpoint, since it changes nothing but when a run ends."""

    def __init__(self) -> None:
        self._usual: dict[str, float] = {}
        self._turns: dict[str, int] = {}

    def fault(self, role: str, loss: float, norm: float) -> str:
        """What is wrong with a loss and the norm of its gradient; empty when nothing is."""
        if not math.isfinite(loss + norm):
            return "is not finite"
        turns, usual = self._turns.get(role, 0), self._usual.get(role, 0.0)
        if turns >= WARM and abs(loss) > FAR * usual:
            return f"exploded from {usual:.4g}"
        self._turns[role] = turns + 1
        share = min(MEMORY, turns / (turns + 1))
        self._usual[role] = share * usual + (1 - share) * abs(loss)
        return ""
