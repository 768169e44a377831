"""What the planner tries for a video: the plans that make sense on given hardware, and the changes that would make one fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from sonic.config import FIXED_STEPS
from sonic.parallel.parallel_config import SINGLE_RANK_PLANS, HardwareConfig, OffloadConfig, ParallelConfig
from sonic.planner.plans import PLANS, Plan, degree, pipeline_fault
from sonic.planner.workload import Workload

OPTIONAL = ("zero3",)  # plans that need a package which is not always there
FEWEST_STEPS, FEWEST_BLOCKS, FEWEST_FRAMES = 1, 1, 12

Changed = Iterator[tuple[str, tuple[str, ...], Workload]]  # a sentence, the options that say it, the job with it


def video_plan(work: Workload, hardware: HardwareConfig, parallel: ParallelConfig) -> Plan:
    """The plan that these settings name."""
    plan = PLANS[parallel.name](work, hardware, parallel)
    return replace(plan, options=instead(plan.parallel, ParallelConfig()))


def by_name(parallel: ParallelConfig, hardware: HardwareConfig) -> bool:
    """Whether devices would be idle under a plan, or it needs an optional package: a job that is started takes it when it is named."""
    return parallel.name in OPTIONAL or (parallel.name in SINGLE_RANK_PLANS and hardware.devices > 1)


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
    return not work.model.trunk.num_heads % share and not work.query_tokens // work.latent_frames % share


def why_not(parallel: ParallelConfig, work: Workload, hardware: HardwareConfig) -> str:
    """The sentence for a plan that makes no sense here; empty when it does."""
    name, devices, share = parallel.name, hardware.devices, degree(parallel, hardware)
    heads, rows = work.model.trunk.num_heads, work.query_tokens // work.latent_frames
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


def instead(parallel: ParallelConfig, asked: ParallelConfig) -> tuple[str, ...]:
    """What to type for these settings instead of those asked for: the plan's name, and what is not as usual or was asked otherwise."""
    usual, offload = ParallelConfig(), OffloadConfig()
    found = [f"parallel={parallel.name}"]
    found += [f"parallel.vae_rank={str(bool(parallel.vae_rank)).lower()}"] * (bool(parallel.vae_rank) != bool(asked.vae_rank))
    for name in ("context", "cpu_offload"):
        value = getattr(parallel, name)
        found += [f"parallel.{name}={str(value).lower()}"] * (value != getattr(usual, name) or value != getattr(asked, name))
    for name in ("kv", "store"):
        value = getattr(parallel.offload, name)
        found += [f"offload.{name}={value}"] * (value != getattr(offload, name) or value != getattr(asked.offload, name))
    return tuple(found)


def fewer_steps(work: Workload) -> Changed:
    """Each step has its ring; a schedule that is one table gives way to the one that takes any number of steps."""
    schedule = "live_avatar" if work.schedule in FIXED_STEPS else work.schedule
    other = () if schedule == work.schedule else (f"sampler.schedule={schedule}",)
    for fewer in () if work.clip_frames else range(work.steps - 1, FEWEST_STEPS - 1, -1):
        changed = replace(work, steps=fewer, schedule=schedule)
        yield f"{fewer} steps instead of {work.steps}", (*other, f"sampler.sample_steps={fewer}"), changed


def shorter_windows(work: Workload) -> Changed:
    """Rings of fewer blocks."""
    rollout = work.model.rollout
    for fewer in () if work.clip_frames else range(rollout.window_blocks - 1, FEWEST_BLOCKS - 1, -1):
        changed = replace(work, model=replace(work.model, rollout=replace(rollout, window_blocks=fewer)))
        sentence = f"KV rings of {fewer} blocks instead of {rollout.window_blocks} (it forgets sooner)"
        yield sentence, (f"model.rollout.window_blocks={fewer}",), changed


def shorter_clips(work: Workload) -> Changed:
    """Clips of fewer latent frames."""
    for fewer in range(work.clip_frames - 4, FEWEST_FRAMES - 1, -4):
        sentence = f"clips of {fewer} frames instead of {work.clip_frames}"
        yield sentence, (f"video.infer_frames={fewer}",), replace(work, clip_frames=fewer)
