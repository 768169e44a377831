"""Figures of the device check, and the bounds that they are judged by. What is not in `BOUNDS` is reported and not judged."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple


class Bound(NamedTuple):
    """What it means for the user when a figure is not between `least` and `most`; with `only` a goal, on devices of that name alone."""

    meaning: str
    least: float = -math.inf
    most: float = math.inf
    only: str = ""


PEAK = Bound("the planner's memory is wrong here: a plan that should fit may run out of memory, or one that fits be refused", 0.95, 1.05)
BOUNDS = {
    "numerics.float32_error": Bound("the device computes something else than a CPU: do not trust its videos", most=1e-4),
    "numerics.bfloat16_error": Bound(
        "bfloat16 loses more than it should: faces may drift in long videos; use run.dtype=float32", most=0.01
    ),
    "kernels.attention_over_best": Bound("torch takes a slow attention kernel: try run.attention or another torch", most=1.1),
    "single.rotate_share": Bound("rotary positions take a part of every forward that should be arithmetic", most=0.05),
    "single.syncs": Bound("the host waits for the device within a block: frames come slower than they could", most=0),
    "single.busy_share": Bound("the device waits for the host: a faster CPU would give more frames", least=0.95),
    "single.differing_latents": Bound("two videos of one seed differ: no result can be repeated", most=0),
    "single.peak_over_plan": PEAK,
    "single.share_of_product": Bound("the transformer is slower than its matrix products allow", least=0.7, only="H200"),
    "single.compiled_error": Bound("run.compile gives another video: use run.compile=false", most=0.05),
    "single.recompilations": Bound("long videos stop to compile again: use run.compile=false", most=0),
    "offload.differing_latents": Bound("copies race with the layers that use them: parallel=offload gives wrong videos", most=0),
    "offload.late_copies": Bound("layers do not wait for their copies: parallel=offload gives wrong videos on a busy machine", most=0),
    "offload.weights_rate": Bound("weights come slowly from host memory: parallel=offload waits for them", least=20),
    "vae.peak_over_plan": PEAK._replace(least=-math.inf),
    "video.frames_per_second_4_steps": Bound("four steps are slower than this device should be", least=13.7, only="H200"),
    "video.frames_per_second_3_steps": Bound("three steps are slower than this device should be", least=17.0, only="H200"),
    "video.peak_over_plan": PEAK,
    "train.gradients_not_finite": Bound("a distillation ends at its first step", most=0),
    "train.differing_in_checkpoint": Bound("a training that is continued is another one than before", most=0),
    "train.peak_over_plan": PEAK,
    "ranks.differing_latents": Bound("parallel=fsdp gives another video than one device", most=0),
    "ranks.blamed": Bound("when a rank is lost, the message names another one, and its user looks in the wrong place", 1, 1),
    "memory.exit_code": Bound("a script cannot tell that a video ran out of memory", 1, 1),
    "memory.sentences": Bound("a video that runs out of memory does not end with one sentence that says so", 1, 1),
}


class Figures:
    """Sends each figure of a section, with its verdict, to whoever shows it."""

    def __init__(self, section: str, send: Callable[[dict], object], device: str) -> None:
        self.section, self.send, self.device = section, send, device
        self.missing = [name for owner, _, name in (each.partition(".") for each in BOUNDS) if owner == section]

    def add(self, name: str, value: float | str, unit: str = "") -> None:
        """Report a figure, judged by its bound if there is one."""
        record = {"section": self.section, "figure": name, "value": value, "unit": unit}
        if bound := BOUNDS.get(f"{self.section}.{name}"):
            good, goal = bound.least <= value <= bound.most, f"goal on {bound.only} " if bound.only else ""
            asked = " and ".join(f"{sign} {limit:g}" for sign, limit in ((">=", bound.least), ("<=", bound.most)) if math.isfinite(limit))
            record["verdict"] = f"{goal}{asked}: {('met' if good else 'missed') if goal else ('pass' if good else 'fail')}"
            record["failed"] = bound.meaning if not good and bound.only in self.device else ""
        self.missing = [each for each in self.missing if each != name]
        self.send(record)

    def skip(self, name: str, reason: str) -> None:
        """Report that a figure cannot be measured here, and why."""
        self.missing = [each for each in self.missing if each != name]
        self.send({"section": self.section, "figure": name, "value": None, "unit": "", "verdict": f"skipped: {reason}"})


def as_line(record: dict) -> str:
    """A figure as SECTION.NAME=VALUE UNIT (what is asked: verdict)."""
    name, value, verdict = f"{record['section']}.{record['figure']}", record["value"], record.get("verdict", "")
    if value is None:
        return f"{name}: {verdict}"
    shown = f"{value:.4g}" if isinstance(value, float) else str(value)
    return f"{name}={shown} {record['unit']}".rstrip() + f" ({verdict})" * bool(verdict)
