"""Ranks the plans for a job by prediction, and finds the smallest changes that make it fit when no plan does.

Standard library only, so that it runs without torch and without delay.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from sonic.config import PHOTO_SIZE
from sonic.parallel.parallel_config import PLANS, HardwareConfig, ParallelConfig, PlanConfig
from sonic.planner import training_plans as trainings
from sonic.planner import video_candidates as videos
from sonic.planner import window_plans as windows
from sonic.planner.command_line import command_line
from sonic.planner.memory import GIB, union
from sonic.planner.plans import Plan
from sonic.planner.window_workload import WindowWorkload
from sonic.planner.workload import Training, Workload, workload

EQUAL = 1.02
LESS = 0.9  # of the estimated memory of a plan that ran out of memory

Job = Workload | WindowWorkload
KINDS = {  # by type of job: modules with plan, candidates, instead and CHANGES, and for a video notes
    Workload: videos,
    WindowWorkload: windows,
    Training: trainings,
}


class Tracked(NamedTuple):
    """GiB of every rank by phase, measured in a run on fake tensors; or no ranks, and the reason why this plan cannot be measured."""

    ranks: Sequence[Mapping[str, float]] = ()
    reason: str = ""


@dataclass(frozen=True)
class Change:
    """A change that makes the job fit: a sentence, the options that make it, and the plan that then fits."""

    sentence: str
    options: tuple[str, ...]
    plan: Plan


@dataclass(frozen=True)
class PlanResult:
    """Result of a search: all plans, the best one first, and, when none fits, the changes that make the job fit.

    `asked` has the options that the planner was given on a command line; None elsewhere."""

    work: Job
    hardware: HardwareConfig
    plans: tuple[Plan, ...]
    changes: tuple[Change, ...] = ()
    notes: tuple[str, ...] = ()
    asked: tuple[str, ...] | None = None

    @property
    def chosen(self) -> Plan:
        """The best plan: the fastest that fits, or the one that lacks the least memory."""
        return self.plans[0]

    @property
    def fits(self) -> bool:
        """Whether the best plan fits."""
        return self.chosen.missing_gib(self.hardware) == 0

    def command(self, plan: Plan, changes: Sequence[str] = ()) -> str:
        """The command line that runs one of the plans, or after `changes` to the options another one; "" when there was none before."""
        return "" if self.asked is None else command_line(self.asked, plan, self.hardware, changes=changes)


def search_plans(config: PlanConfig, *, idle: bool = True, seconds: float = 0.0) -> PlanResult:
    """Ranked plans for a video of a recording of so many seconds (0 = not known). idle=False leaves out plans that are used only when
    named (`by_name`), for ranks that already run.

    Raises ValueError when the plan named in the config cannot run on this hardware.
    """
    work = workload(config, seconds)
    return replace(search(work, config.hardware, config.parallel, idle=idle), notes=tuple(_notes(config, work)))


def search(work: Job, hardware: HardwareConfig, asked: ParallelConfig, *, idle: bool = True) -> PlanResult:
    """Ranked plans for a video or a training, without notes; `idle` as in `search_plans`."""
    found = PlanResult(work, hardware, _plans(work, hardware, asked, idle=idle))
    return found if found.fits else replace(found, changes=tuple(_changes(found, asked, idle=idle)))


def _plans(work: Job, hardware: HardwareConfig, asked: ParallelConfig, *, idle: bool) -> tuple[Plan, ...]:
    """The plans of all candidate configs, the best one first."""
    kind = KINDS[type(work)]
    tried = [each for each in kind.candidates(asked, work, hardware) if idle or asked.name != "auto" or not by_name(each, hardware)]
    return ranked([kind.plan(work, hardware, each) for each in tried], hardware, work.display_s)


def by_name(parallel: ParallelConfig, hardware: HardwareConfig) -> bool:
    """Whether a plan is used only when named: devices would be idle, or it needs an optional package."""
    plan = PLANS[parallel.name]
    return plan.optional or (plan.one_rank and hardware.ranks > 1)


def ranked(plans: Sequence[Plan], hardware: HardwareConfig, display_s: float = 0.0) -> tuple[Plan, ...]:
    """Plans sorted from best to worst.

    The sort keys in order: lacks less memory, needs not be named (`by_name`), faster, uses no host memory, and last, for a video, the
    lower peak on the device or, for a training, fewer ranks that share tokens. Times within a factor EQUAL of the fastest count as
    equal, and so do all times shorter than the video is displayed for.
    """
    needed = {id(plan): max(plan.seconds.total, display_s) for plan in plans}
    fitting = [needed[id(plan)] for plan in plans if not plan.missing_gib(hardware)]
    enough = EQUAL * min(fitting or needed.values())

    def order(plan: Plan) -> tuple:
        last = plan.parallel.context if plan.unit == "step" else max(plan.peak_gib)
        before = plan.missing_gib(hardware), by_name(plan.parallel, hardware)
        return *before, max(needed[id(plan)], enough), plan.uses_host_memory, last

    return tuple(sorted(plans, key=order))


def _changes(found: PlanResult, asked: ParallelConfig, *, idle: bool) -> Iterator[Change]:
    """The smallest change of each kind that makes the job fit, each found by planning it."""
    work, hardware = found.work, found.hardware
    if asked.name != "auto" or asked.vae_rank:
        best = _plans(work, hardware, replace(asked, name="auto", context=1, vae_rank=None), idle=idle)[0]
        if not best.missing_gib(hardware):
            yield Change(f"another plan: {best.name}", KINDS[type(work)].instead(best.parallel, asked), best)
    for kind in KINDS[type(work)].CHANGES:
        for sentence, options, changed in kind(work):
            best = _plans(changed, hardware, asked, idle=idle)[0]
            if not best.missing_gib(hardware):
                yield Change(sentence, options, best)
                break


def changes_for_less(found: PlanResult, *, host: bool = False) -> tuple[Change, ...]:
    """The smallest change of each kind after which the job needs a tenth less memory of its devices, or of the host, than the best plan."""
    plan, had = found.chosen, found.hardware
    device, elsewhere = max(plan.peak_gib), plan.host_gib(had)
    device, elsewhere = (max(had.usable_gib, device), LESS * elsewhere) if host else (LESS * device, max(had.host_gib, elsewhere))
    lower = replace(found, hardware=replace(had, usable_gib=device, host_gib=elsewhere, memory_gib=0.0))
    return tuple(replace(change, options=_with_residents(change)) for change in _changes(lower, plan.parallel, idle=False))


def _with_residents(change: Change) -> tuple[str, ...]:
    """The options of a change, and for offload how much stays on the device, which would else be all that fits."""
    parallel = change.plan.parallel
    stays = parallel.offload.resident_gib if parallel.name == "offload" else -1
    return (*change.options, f"offload.resident_gib={stays:.1f}") if stays >= 0 else change.options


def in_words(changes: Sequence[Change]) -> str:
    """Changes with the options that make them, as part of a sentence."""
    return "; ".join(f"{change.sentence} ({' '.join(change.options)})" for change in changes)


def as_json(found: PlanResult, tracked: Tracked | None = None) -> dict:
    """The result as JSON values, with the tracked memory of the chosen plan if that was asked for."""
    plans = [{**plan_json(plan, found.hardware), "command": found.command(plan)} for plan in found.plans]
    if tracked and tracked.reason:
        plans[0].update(tracked=None, tracked_reason=tracked.reason)
    elif tracked:
        fullest = max(tracked.ranks, key=lambda rank: max(rank.values()))
        plans[0]["tracked_gib_per_rank"] = [round(max(rank.values()), 3) for rank in tracked.ranks]
        plans[0]["tracked_phases_gib"] = {phase: round(size, 3) for phase, size in fullest.items()}
    return {
        "chosen": plans[0],
        "plans": plans,
        "fits": found.fits,
        "missing_gib": round(found.chosen.missing_gib(found.hardware), 3),
        "changes": [
            {
                **plan_json(change.plan, found.hardware),
                "change": change.sentence,
                "options": list(change.options),
                "command": found.command(change.plan, change.options),
            }
            for change in found.changes
        ],
        "notes": list(found.notes),
    }


def plan_json(plan: Plan, hardware: HardwareConfig) -> dict:
    """A plan as JSON values; items and phases are those of the rank with the highest peak, and "block" is a step of a training."""
    total = round(plan.seconds.total, 4)
    return {
        "plan": plan.name,
        "fits": plan.missing_gib(hardware) == 0,
        "peak_gib_per_rank": [round(each, 3) for each in plan.peak_gib],
        "items_gib": {name: round(size / GIB, 3) for name, size in union(plan.fullest).items()},
        "phases_gib": {phase: round(sum(items.values()) / GIB, 3) for phase, items in plan.fullest.items()},
        "host_gib_per_rank": round(plan.host / GIB, 2),
        "seconds_per_block": total,
        f"seconds_per_{plan.unit}": total,
        "seconds_per_frame": plan.seconds.total / plan.frames,
        "frames_per_second": round(plan.frames_per_second, 3),
        "first_frame_s": round(plan.seconds.first, 3),
        "reason": reason(plan, hardware),
        "seconds": {name: round(value, 4) for name, value in vars(plan.seconds).items()},
        "ranges": [[layers.start, layers.stop] for layers in plan.ranges],
        "parallel": vars(plan.parallel) | {"offload": vars(plan.parallel.offload)},
        "options": list(plan.options),
    }


def reason(plan: Plan, hardware: HardwareConfig) -> str:
    """A sentence that says why a plan fits or not, and whether arithmetic or copying limits its speed."""
    device, host = max(plan.peak_gib), plan.host_gib(hardware)
    if device > hardware.usable_gib:
        items = {name: size for name, size in plan.fullest[plan.phase].items() if name != "reserve"}
        largest = max(items, key=items.__getitem__)
        lacks = f"{device - hardware.usable_gib:.1f} GiB too much for a device of {hardware.usable_gib:g} in its {plan.phase} phase"
        return f"{lacks}; the largest part is {largest.replace('_', ' ')}, {items[largest] / GIB:.1f} GiB"
    if host > hardware.host_gib:
        return f"{host - hardware.host_gib:.1f} GiB too much for {hardware.host_gib:g} GiB of host memory"
    seconds = plan.seconds
    bound = "arithmetic" if seconds.compute >= seconds.weights + seconds.activations else "copying"
    spare = f"fits with {hardware.usable_gib - device:.1f} GiB to spare, fullest in its {plan.phase} phase, bound by {bound}"
    if plan.parallel.vae_rank:
        spare += "; the VAE has a rank of its own"
    return f"{spare}; {plan.given_up}" if plan.given_up else spare


def _notes(config: PlanConfig, work: Job) -> Iterator[str]:
    """Sentences on the assumptions of the plans."""
    if not config.model.resolution and config.video.size == PHOTO_SIZE:
        size = f"{work.width}x{work.height}"
        yield f"video.size=photo: the photograph is not known here, so {size} is planned; video.size=WIDTHxHEIGHT plans another"
    yield from KINDS[type(work)].notes(work)
