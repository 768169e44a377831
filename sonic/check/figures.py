"""Figures of the device check, and the bounds that they are judged by. What is not in `BOUNDS` is reported and not judged."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

MANY_SIGNIFICANT = 4  # digits of a figure that are printed


class Bound(NamedTuple):
    """Least and greatest value that a figure may have, and what it means for the user when it has another.

    With `only` the bound is a goal that counts on devices with that name alone.
    """

    meaning: str
    least: float = -math.inf
    most: float = math.inf
    only: str = ""


BITS = "videos of the same seed and inputs differ, so that no result can be repeated"
PEAK = "the planner's memory is wrong here: a plan that should fit may run out of memory, or one that fits be refused"
LOST = "when a rank is lost, the message names another one, and its user looks in the wrong place"
BOUNDS = {
    "numerics.float32_error": Bound("the device computes something else than a CPU: do not trust its videos", most=1e-4),
    "numerics.bfloat16_error": Bound("bfloat16 loses more than it should: faces may drift in long videos; use run.dtype=float32", most=0.02),
    "kernels.attention_over_best": Bound("torch takes a slow attention kernel: try run.attention or another version of torch", most=1.1),
    "kernels.rotate_share": Bound("rotary positions take a part of every forward that should be arithmetic", most=0.05),
    "single.syncs": Bound("the host waits for the device within a block: frames come slower than they could", most=0),
    "single.busy_share": Bound("the device waits for the host: a faster CPU, or run.compile, would give more frames", least=0.95),
    "single.differing_latents": Bound(BITS, most=0),
    "single.peak_over_plan": Bound(PEAK, least=0.95, most=1.05),
    "single.share_of_product": Bound("the transformer is slower than its matrix products allow", least=0.7, only="H200"),
    "offload.differing_latents": Bound("copies of weights or keys race with the layers that use them: parallel=offload gives wrong videos", most=0),
    "offload.weights_rate": Bound("weights come slowly from host memory: parallel=offload waits for them", least=20),
    "vae.peak_over_plan": Bound(PEAK, most=1.05),
    "video.frames_per_second": Bound("four steps are slower than this device should be", least=13.7, only="H200"),
    "video.frames_per_second_3_steps": Bound("three steps are slower than this device should be", least=17.0, only="H200"),
    "video.peak_over_plan": Bound(PEAK, least=0.95, most=1.05),
    "train.gradients_not_finite": Bound("a distillation ends at its first step", most=0),
    "train.differing_in_checkpoint": Bound("a training that is continued is another one than before", most=0),
    "train.peak_over_plan": Bound(PEAK, least=0.95, most=1.05),
    "ranks.differing_latents": Bound("parallel=fsdp gives another video than one device", most=0),
    "ranks.blamed": Bound(LOST, least=1, most=1),
    "memory.exit_code": Bound("a script cannot tell that a video ran out of memory", least=1, most=1),
    "memory.sentences": Bound("a video that runs out of memory ends without one sentence that says so", least=1, most=1),
}

Value = float | int | str


class Figures:
    """Sends each figure of a section, with its verdict, to whoever shows it."""

    def __init__(self, section: str, send: Callable[[dict], object], device: str) -> None:
        self.section, self.send, self.device = section, send, device

    def add(self, name: str, value: Value, unit: str = "") -> None:
        """Report a figure, judged by its bound if there is one. Raises ValueError for one that has a bound and is not a number."""
        bound, found = BOUNDS.get(f"{self.section}.{name}"), {"section": self.section, "figure": name, "value": value, "unit": unit}
        if bound is None:
            self.send(found)
            return
        good, counts = bound.least <= value <= bound.most, bound.only in self.device
        verdict = ("pass" if good else "fail") if not bound.only else f"goal on {bound.only}: {'met' if good else 'missed'}"
        asked = " and ".join(f"{sign} {limit:g}" for sign, limit in ((">=", bound.least), ("<=", bound.most)) if math.isfinite(limit))
        self.send({**found, "asked": asked, "verdict": verdict, "failed": counts and not good})

    def skip(self, reason: str, *names: str) -> None:
        """Report figures that cannot be measured here, and why."""
        for name in names:
            self.send({"section": self.section, "figure": name, "value": None, "verdict": f"skipped: {reason}"})


def as_line(record: dict) -> str:
    """A figure as SECTION.NAME=VALUE with its unit, what was asked of it, and the verdict."""
    name, value = f"{record['section']}.{record['figure']}", record["value"]
    if value is None:
        return f"{name}: {record['verdict']}"
    shown = f"{value:.{MANY_SIGNIFICANT}g}" if isinstance(value, float) else str(value)
    verdict = f" ({record['asked']}, {record['verdict']})" if "verdict" in record else ""
    return f"{name}={shown}{' ' * bool(record['unit'])}{record['unit']}{verdict}"


def meaning_of(record: dict) -> str:
    """What a failed figure means for the user, as a sentence."""
    return f"{record['figure']}: {BOUNDS[record['section'] + '.' + record['figure']].meaning}"
