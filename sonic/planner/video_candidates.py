"""Lists what the planner tries for a video: the configs that are possible on given hardware, and the changes that reduce memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod

from sonic.families import FAMILIES
from sonic.parallel.parallel_config import HardwareConfig, OffloadConfig, ParallelConfig
from sonic.planner.plans import Plan, divisors, estimated, pipeline_fault, token_ranks
from sonic.planner.workload import Workload

FEWEST_STEPS, FEWEST_BLOCKS, FEWEST_FRAMES = 1, 1, 12
SIDE, SMALLEST_SIDE = 64, 128  # pixels; sizes of the published models are multiples of SIDE

Changed = Iterator[tuple[str, tuple[str, ...], Workload]]  # a sentence, the options that make this change, the changed job


def plan(work: Workload, hardware: HardwareConfig, parallel: ParallelConfig) -> Plan:
    """The plan of this config, with the command-line options that select it."""
    found = estimated(work, hardware, parallel)
    return replace(found, options=instead(found.parallel, ParallelConfig()))


def candidates(asked: ParallelConfig, work: Workload, hardware: HardwareConfig) -> Iterator[ParallelConfig]:
    """The configs to try: the named one, or for auto every plan that is possible.

    parallel.vae_rank=true selects the pipeline. Raises ValueError when the named plan is not possible."""
    if asked.name == "auto" and asked.vae_rank:
        asked = replace(asked, name="pipeline")
    if asked.name != "auto":
        sentence = why_not(asked, work, hardware)
        if sentence:
            raise ValueError(f"parallel={asked.name}: {sentence}")
        yield asked
        return
    every = [replace(asked, name=name, context=-1 if name == "context" else 1) for name in FAMILIES[work.model.family].plans]
    every += [replace(asked, name=name, context=ranks) for name in ("fsdp", "pipeline") for ranks in divisors(hardware.ranks)[1:]]
    every += [replace(asked, name=name, cpu_offload=True) for name in ("fsdp", "zero3")]
    away = {"kv": "host"}
    every += [replace(asked, name="offload", offload=replace(asked.offload, **more)) for more in (away, {**away, "store": "mmap"})]
    yield from (parallel for parallel in every if not why_not(parallel, work, hardware) and _even(token_ranks(parallel, hardware), work))


def _even(share: int, work: Workload) -> bool:
    """Whether `share` ranks can divide heads and tokens of a frame evenly."""
    return not work.model.trunk.num_heads % share and not work.query_tokens // work.latent_frames % share


def why_not(parallel: ParallelConfig, work: Workload, hardware: HardwareConfig) -> str:
    """The reason why a plan is not possible here; "" when it is."""
    name, devices, share = parallel.name, hardware.ranks, token_ranks(parallel, hardware)
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
    """The command-line options that select `parallel`: its name, and each field that differs from its default or from `asked`."""
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
    """Changes to fewer sampling steps, which have fewer KV rings."""
    for fewer in () if work.clip_frames else range(work.steps - 1, FEWEST_STEPS - 1, -1):
        changed = replace(work, steps=fewer)
        yield f"{fewer} steps instead of {work.steps}", (f"sampler.sample_steps={fewer}",), changed


def shorter_windows(work: Workload) -> Changed:
    """Changes to KV rings of fewer blocks."""
    rollout = work.model.rollout
    for fewer in () if work.clip_frames else range(rollout.window_blocks - 1, FEWEST_BLOCKS - 1, -1):
        changed = replace(work, model=replace(work.model, rollout=replace(rollout, window_blocks=fewer)))
        sentence = f"KV rings of {fewer} blocks instead of {rollout.window_blocks} (it forgets sooner)"
        yield sentence, (f"model.rollout.window_blocks={fewer}",), changed


def shorter_clips(work: Workload) -> Changed:
    """Changes to clips of fewer frames."""
    for fewer in range(work.clip_frames - 4, FEWEST_FRAMES - 1, -4):
        sentence = f"clips of {fewer} frames instead of {work.clip_frames}"
        yield sentence, (f"video.infer_frames={fewer}",), replace(work, clip_frames=fewer)


def smaller_sizes(work: Workload) -> Changed:
    """Changes to smaller sizes of about the same shape; none for a model that has one size only."""
    width, height = work.width, work.height
    seen = {(width, height)}
    for percent in () if work.model.resolution else range(95, 10, -5):
        sides = tuple(max(SIDE, round(side * percent / 100 / SIDE) * SIDE) for side in (width, height))
        if sides not in seen and min(sides) >= SMALLEST_SIDE and prod(sides) < width * height:
            seen.add(sides)
            size = "x".join(map(str, sides))
            yield f"{size} instead of {width}x{height}", (f"video.size={size}",), work.resized(*sides)


def notes(work: Workload) -> Iterator[str]:
    """Sentences on the assumptions of the plans."""
    if work.clip_frames:
        yield f"clips of {work.clip_frames} frames with full attention; a 'block' below is a clip"
    yield "text and speech encoders run first and are gone before the transformer comes; a peak is the larger of the two moments"


CHANGES = (fewer_steps, shorter_windows, shorter_clips, smaller_sizes)
