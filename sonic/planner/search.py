"""Says before anything is started what fits, how fast it can be and why; finds the smallest changes when nothing fits.

Standard library only, so that it answers at once on any laptop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Generic, TypeVar

from sonic.config import FIXED_STEPS, PHOTO_SIZE
from sonic.parallel.parallel_config import ALONE, HardwareConfig, ParallelConfig, PlanConfig
from sonic.planner.memory import ENCODE, FILM, GIB
from sonic.planner.plans import PLANS, Plan, degree, pipeline_fault
from sonic.planner.workload import ASSUMED_SIZE, Workload, workload

OPTIONAL = ("zero3",)  # plans that need a package which is not always there
SIDE = 64  # published sizes are multiples of it
FEWEST_STEPS, FEWEST_BLOCKS, SMALLEST_SIDE = 1, 1, 128
EQUAL = 1.02

W, P = TypeVar("W"), TypeVar("P")  # what is to be done, and a plan for it: of a film here, of a training in training_plans.py


Changed = Iterator[tuple[str, tuple[str, ...], PlanConfig]]  # a sentence, the knobs that say it, the config with it


@dataclass(frozen=True)
class Change(Generic[P]):
    """What would make the job fit: a sentence, the knobs that say it, and the plan that then fits."""

    sentence: str
    knobs: tuple[str, ...]
    plan: P


@dataclass(frozen=True)
class Planned(Generic[W, P]):
    """The answer: all plans, the best one first; when it does not fit, the changes that would help."""

    work: W
    hardware: HardwareConfig
    plans: tuple[P, ...]
    changes: tuple[Change[P], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def chosen(self) -> Plan:
        """The fastest that fits, or the one that lacks least."""
        return self.plans[0]

    @property
    def fits(self) -> bool:
        """Whether there is a plan to run."""
        return self.chosen.missing_gib(self.hardware) == 0


def planned(config: PlanConfig, *, idle: bool = True) -> Planned:
    """Plans for a job; with idle=False none of those that are taken `by_name` only, as for ranks that are there already.

    Raises ValueError when the plan asked for by name makes no sense on this hardware.
    """
    work, hardware = workload(config), config.hardware
    plans = ranked(work, hardware, list(candidates(config.parallel, work, hardware, idle=idle)))
    found = Planned(work, hardware, plans, notes=tuple(_notes(config, work)))
    return found if found.fits else replace(found, changes=tuple(changes(config, idle=idle)))


def ranked(work: Workload, hardware: HardwareConfig, settings: Sequence[ParallelConfig]) -> tuple[Plan, ...]:
    """A plan for each of the settings: those that fit first, those before that need not be taken `by_name`, then the fastest, of equally
    fast ones the leanest on the device, those last that lean on host memory.

    Times within EQUAL of the fastest count as equal, and so do all that are faster than the film is shown.
    """
    plans = [PLANS[parallel.name](work, hardware, parallel) for parallel in settings]
    needed = [max(plan.seconds.total, work.shown) for plan in plans]
    fitting = [time for plan, time in zip(plans, needed, strict=True) if not plan.missing_gib(hardware)]
    enough = EQUAL * min(fitting or needed)
    order = [
        (plan.missing_gib(hardware), by_name(plan.parallel, hardware), max(time, enough), plan.leans_on_host, max(plan.peak_gib))
        for plan, time in zip(plans, needed, strict=True)
    ]
    return tuple(plans[index] for index in sorted(range(len(plans)), key=order.__getitem__))


def by_name(parallel: ParallelConfig, hardware: HardwareConfig) -> bool:
    """Whether devices would be idle under a plan, or it needs an optional package: a job that is started takes it when it is named."""
    return parallel.name in OPTIONAL or (parallel.name in ALONE and hardware.devices > 1)


def candidates(asked: ParallelConfig, work: Workload, hardware: HardwareConfig, *, idle: bool = True) -> Iterator[ParallelConfig]:
    """The settings worth a try: what was asked for, or for auto every plan that makes sense, with idle=False none of those that are
    taken `by_name`; a rank for the VAE is a pipeline's."""
    if asked.name == "auto" and asked.vae_rank:
        asked = replace(asked, name="pipeline")
    if asked.name != "auto":
        sentence = why_not(asked, work, hardware)
        if sentence:
            raise ValueError(f"parallel={asked.name}: {sentence}")
        yield asked
        return
    every = [replace(asked, name=name, context=-1 if name == "context" else 1) for name in PLANS]
    every += [replace(asked, name=name, context=ranks) for name in ("fsdp", "pipeline") for ranks in (2, 4, 8)]
    every += [replace(asked, name=name, cpu_offload=True) for name in ("fsdp", "zero3")]
    away = {"kv": "host"}
    every += [replace(asked, name="offload", offload=replace(asked.offload, **more)) for more in (away, {**away, "store": "mmap"})]
    wanted = (parallel for parallel in every if idle or not by_name(parallel, hardware))
    yield from (parallel for parallel in wanted if not why_not(parallel, work, hardware) and _even(degree(parallel, hardware), work))


def _even(share: int, work: Workload) -> bool:
    """Whether so many ranks have equally much to do when they share tokens and heads."""
    return not work.model.trunk.num_heads % share and not work.noisy // work.latent_frames % share


def why_not(parallel: ParallelConfig, work: Workload, hardware: HardwareConfig) -> str:
    """The sentence for a plan that makes no sense here; empty when it does."""
    name, devices, share = parallel.name, hardware.devices, degree(parallel, hardware)
    heads, rows = work.model.trunk.num_heads, work.noisy // work.latent_frames
    if name in ("pipeline", "context") and devices == 1:
        return "it spreads the model over devices, and there is one; use single or offload"
    if name == "fsdp" and devices == 1 and not parallel.cpu_offload:
        return "it shares weights between devices, and there is one; use single or offload"
    if name == "zero3" and devices == 1 and not parallel.cpu_offload:
        return "with one device it needs parallel.cpu_offload=true; or use offload"
    if name in ("single", "offload") and share > 1:
        return "it has no token sharing; leave parallel.context at 1"
    if devices % share or share > min(heads, rows):
        whole = f"{heads} heads and {rows} tokens of a frame on {devices} devices"
        return f"{share} ranks cannot share {whole}; choose another parallel.context"
    if name == "pipeline" and (fault := pipeline_fault(parallel, work, hardware)):
        return fault
    if name == "offload" and work.clip_frames and parallel.offload.kv == "host":
        return "clips have no KV rings to move; leave offload.kv at device"
    return ""


def changes(config: PlanConfig, *, idle: bool = True) -> Iterator[Change]:
    """The smallest change of each kind that makes the job fit, each found by planning it."""
    for kind in (partial(_other_plans, idle=idle), _fewer_steps, _shorter_windows, _shorter_clips, _smaller_sizes):
        for sentence, knobs, changed in kind(config):
            work, hardware = workload(changed), changed.hardware
            best = ranked(work, hardware, list(candidates(changed.parallel, work, hardware, idle=idle)))[0]
            if best.missing_gib(hardware) == 0:
                yield Change(sentence, knobs, best)
                break


def as_json(found: Planned, tracked: Sequence[float] | None = None, *, untracked: str = "") -> dict:
    """The answer for programs; `tracked` is what the chosen plan took on fake tensors, GiB per rank, `untracked` why that is not
    known although it was asked for."""
    plans = [plan_json(plan, found.hardware) for plan in found.plans]
    if tracked is not None:
        plans[0]["tracked_gib_per_rank"] = [round(each, 3) for each in tracked]
    return answer_json(found, plans, plan_json, untracked=untracked)


def answer_json(found: Planned[W, P], plans: Sequence[dict], as_dict: Callable[[P, HardwareConfig], dict], *, untracked: str = "") -> dict:
    """What all answers have in common; `plans` are those of `found`, the chosen one first."""
    if untracked:
        plans[0].update(tracked=None, tracked_reason=untracked)
    return {
        "chosen": plans[0],
        "plans": plans,
        "fits": found.fits,
        "missing_gib": round(found.chosen.missing_gib(found.hardware), 3),
        "changes": [
            {"change": change.sentence, "knobs": list(change.knobs), **as_dict(change.plan, found.hardware)} for change in found.changes
        ],
        "notes": list(found.notes),
    }


def plan_json(plan: Plan, hardware: HardwareConfig) -> dict:
    """A plan for programs; items are those of the fullest rank."""
    parts = {name: round(value, 4) for name, value in vars(plan.seconds).items()}
    return {
        "plan": plan.name,
        "fits": plan.missing_gib(hardware) == 0,
        "peak_gib_per_rank": [round(each, 3) for each in plan.peak_gib],
        "items_gib": {name: round(size / GIB, 3) for name, size in plan.fullest.items()},
        "host_gib_per_rank": round(plan.host / GIB, 2),
        "seconds_per_block": round(plan.seconds.total, 4),
        "frames_per_second": round(plan.frames_per_second, 3),
        "first_frame_s": round(plan.seconds.first, 3),
        "reason": reason(plan, hardware),
        "seconds": parts,
        "ranges": [[layers.start, layers.stop] for layers in plan.ranges],
        "parallel": vars(plan.parallel) | {"offload": vars(plan.parallel.offload)},
    }


def reason(plan: Plan, hardware: HardwareConfig) -> str:
    """Why a plan fits or not, and what it is bound by."""
    device, host = max(plan.peak_gib), plan.host * len(plan.ranks) / GIB
    if device > hardware.usable_gib:
        largest = max((name for name in (*FILM, *ENCODE) if name != "reserve"), key=lambda name: plan.fullest[name])
        lacks = f"{device - hardware.usable_gib:.1f} GiB too much for a device of {hardware.usable_gib:g}"
        return f"{lacks}; the largest part is {largest.replace('_', ' ')}, {plan.fullest[largest] / GIB:.1f} GiB"
    if host > hardware.host_gib:
        return f"{host - hardware.host_gib:.1f} GiB too much for {hardware.host_gib:g} GiB of host memory"
    seconds = plan.seconds
    bound = "arithmetic" if seconds.compute >= seconds.weights + seconds.activations else "copying"
    spare = f"fits with {hardware.usable_gib - device:.1f} GiB to spare, bound by {bound}"
    if plan.parallel.vae_rank:
        spare += "; the VAE has a rank of its own"
    return f"{spare}; {plan.given_up}" if plan.given_up else spare


def _other_plans(config: PlanConfig, *, idle: bool) -> Changed:
    if config.parallel.name != "auto" or config.parallel.vae_rank:
        changed = replace(config, parallel=replace(config.parallel, name="auto", context=1, vae_rank=None))
        work, hardware = workload(changed), changed.hardware
        best = ranked(work, hardware, list(candidates(changed.parallel, work, hardware, idle=idle)))[0]
        yield f"another plan: {best.name}", tuple(_knobs(best.parallel, config.parallel)), changed


def _knobs(parallel: ParallelConfig, asked: ParallelConfig) -> Iterator[str]:
    """What to type for these settings instead of those asked for: the plan's name and what is not as usual."""
    yield f"parallel={parallel.name}"
    usual = ParallelConfig()
    if bool(parallel.vae_rank) != bool(asked.vae_rank):
        yield f"parallel.vae_rank={str(bool(parallel.vae_rank)).lower()}"
    for knob in ("context", "cpu_offload"):
        if getattr(parallel, knob) != getattr(usual, knob):
            yield f"parallel.{knob}={str(getattr(parallel, knob)).lower()}"
    for knob in ("kv", "store"):
        if getattr(parallel.offload, knob) != getattr(usual.offload, knob):
            yield f"offload.{knob}={getattr(parallel.offload, knob)}"


def _fewer_steps(config: PlanConfig) -> Changed:
    """Each step has its ring; a schedule that is one table gives way to the one that takes any number of steps."""
    steps, named = config.sampler.sample_steps, config.sampler.schedule
    schedule = "live_avatar" if named in FIXED_STEPS else named
    if workload(config).clip_frames:
        return
    for fewer in range(steps - 1, FEWEST_STEPS - 1, -1):
        sampler = replace(config.sampler, sample_steps=fewer, schedule=schedule)
        other = () if schedule == named else (f"sampler.schedule={schedule}",)
        yield f"{fewer} steps instead of {steps}", (*other, f"sampler.sample_steps={fewer}"), replace(config, sampler=sampler)


def _shorter_windows(config: PlanConfig) -> Changed:
    rollout = config.model.rollout
    if not workload(config).clip_frames:
        for fewer in range(rollout.window_blocks - 1, FEWEST_BLOCKS - 1, -1):
            model = replace(config.model, rollout=replace(rollout, window_blocks=fewer))
            sentence = f"KV rings of {fewer} blocks instead of {rollout.window_blocks} (it forgets sooner)"
            yield sentence, (f"model.rollout.window_blocks={fewer}",), replace(config, model=model)


def _shorter_clips(config: PlanConfig) -> Changed:
    frames = workload(config).clip_frames
    for fewer in range(frames - 4, 11, -4):
        shorter = replace(config, video=replace(config.video, infer_frames=fewer))
        yield f"clips of {fewer} frames instead of {frames}", (f"video.infer_frames={fewer}",), shorter


def _smaller_sizes(config: PlanConfig) -> Changed:
    work = workload(config)
    return smaller_sizes(config, work.width, work.height)


def smaller_sizes(config: PlanConfig, width: int, height: int) -> Changed:
    """Smaller sizes of about the same shape; none for a model that has one size only."""
    seen = {(width, height)}
    for percent in () if config.model.resolution else range(95, 10, -5):
        sides = tuple(max(SIDE, round(side * percent / 100 / SIDE) * SIDE) for side in (width, height))
        if sides not in seen and min(sides) >= SMALLEST_SIDE and prod(sides) < width * height:
            seen.add(sides)
            size = "x".join(map(str, sides))
            smaller = replace(config, video=replace(config.video, size=size))
            yield f"{size} instead of {width}x{height}", (f"video.size={size}",), smaller


def _notes(config: PlanConfig, work: Workload) -> Iterator[str]:
    """What the plan took for granted."""
    if not config.model.resolution and config.video.size == PHOTO_SIZE:
        yield f"video.size=photo: the photograph is not known here, so {ASSUMED_SIZE} is planned; video.size=WIDTHxHEIGHT plans another"
    if work.clip_frames:
        yield f"clips of {work.clip_frames} frames with full attention; a 'block' below is a clip"
    yield "text and speech encoders run first and are gone before the transformer comes; a peak is the larger of the two moments"
