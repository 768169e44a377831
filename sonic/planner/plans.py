"""Each plan's memory and time for a job on given hardware. A function per plan; none of them runs anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import NamedTuple

from sonic.parallel.layer_ranges import best_ranges, ranges_of, resident_layers
from sonic.parallel.parallel_config import HardwareConfig, ParallelConfig
from sonic.planner import memory as m
from sonic.planner import step_time as s
from sonic.planner.memory import GIB, Phases
from sonic.planner.workload import Workload

ZERO_BUCKET = 50_000_000  # numbers that DeepSpeed gathers ahead for each of parallel.prefetch
MESSAGES = 2  # copies of the stream between two stages: what came, and what has not left yet
MARGIN = 0.05  # of a device's memory that a pipeline's ranges leave free if they can: predictions are that good
FASTER = 1.0001  # what a rank for the autoencoder must gain; less is rounding
CLIPS_WAIT = (
    "it runs videos block by block; a clip with full attention is one forward after the other, "
    "so ranks would wait for each other: use parallel=fsdp with parallel.context=-1"
)
SPARE_GIB = 0.2  # that an offloading plan leaves free, so that a small mistake of the prediction does no harm


@dataclass(frozen=True)
class Plan:
    """One way to do a job: bytes of each rank by phase and item, bytes of host memory of each, times, frames that come out of a `unit`
    (a block of a video or a step of a training), and what to tell the command that does it."""

    name: str
    parallel: ParallelConfig
    ranks: tuple[Phases, ...]
    host: float
    seconds: s.Seconds
    frames: int
    ranges: tuple[range, ...] = ()
    given_up: str = ""
    unit: str = "block"
    options: tuple[str, ...] = ()

    @property
    def fullest(self) -> Phases:
        """The rank that needs most."""
        return max(self.ranks, key=m.peak)

    @property
    def phase(self) -> str:
        """When it needs most."""
        return max(self.fullest, key=lambda phase: sum(self.fullest[phase].values()))

    @property
    def peak_gib(self) -> list[float]:
        """Peak of every rank."""
        return [m.peak(rank) / GIB for rank in self.ranks]

    @property
    def frames_per_second(self) -> float:
        """Of one video, or of all clips that a training learns from."""
        return self.frames / self.seconds.total

    @property
    def uses_host_memory(self) -> bool:
        """Whether something waits in host memory that a device could hold."""
        return bool(self.given_up) or self.parallel.cpu_offload

    def missing_gib(self, hardware: HardwareConfig) -> float:
        """What the fullest rank, or host memory, lacks; 0 when the plan fits."""
        device = max(self.peak_gib) - hardware.usable_gib
        host = self.host * len(self.ranks) / GIB - hardware.host_gib
        return max(0.0, device, host)


Maker = Callable[[Workload, HardwareConfig, ParallelConfig], Plan]


def single(work: Workload, hardware: HardwareConfig, parallel: ParallelConfig) -> Plan:
    """One device holds everything."""
    busy = max(m.activation_bytes(work).values())
    rank = _rank(work, hardware, weights=m.model_bytes(work), activations=busy, **_memories(work))
    weights, rings = s.read_seconds(work, hardware)
    seconds = _seconds(work, hardware, compute=s.compute_seconds(work, hardware), weights=weights, activations=rings)
    return Plan("single", parallel, (rank,), m.HOST_GIB * GIB, seconds, work.frames)


def fsdp(work: Workload, hardware: HardwareConfig, parallel: ParallelConfig) -> Plan:
    """Weights sharded over all ranks; `parallel.context` of them share the tokens of one video."""
    world, share = hardware.devices, degree(parallel, hardware)
    shards = world // max(1, parallel.replicas)
    busy = m.activation_bytes(work, share=share)
    gathered = m.gathered_bytes(work, parallel, shards)
    phase = max(gathered, key=lambda name: gathered[name] + busy[name])
    piece, away = m.slice_bytes(work, shards), parallel.cpu_offload
    weights = m.whole_bytes(work) + (0 if away else piece)
    loads = {"weights": weights, "unshard_prefetch": gathered[phase], "activations": busy[phase]}
    ranks = _ranks(work, hardware, loads | _memories(work, share), count=world, leaders=world // share)
    moved = s.forwards(work) * s.link_seconds(m.model_bytes(work) * (shards - 1) / shards, hardware)
    if away:
        moved = max(moved, s.forwards(work) * s.host_seconds(piece, hardware))
    read, rings = s.read_seconds(work, hardware, share=1 / share)
    seconds = _seconds(
        work,
        hardware,
        compute=s.compute_seconds(work, hardware) / share,
        weights=max(moved, read * share),
        activations=rings + s.exchange_seconds(work, hardware, share),
    )
    name = f"fsdp{'+context' if share > 1 else ''}{'+cpu_offload' if away else ''}"
    host = m.HOST_GIB * GIB + (piece if away else 0.05 * piece)
    return Plan(name, parallel, ranks, host, seconds, work.frames)


def context(work: Workload, hardware: HardwareConfig, parallel: ParallelConfig) -> Plan:
    """Every rank holds the weights and a share of each frame's tokens."""
    share = hardware.devices
    busy = max(m.activation_bytes(work, share=share).values())
    loads = {"weights": m.model_bytes(work), "activations": busy}
    ranks = _ranks(work, hardware, loads | _memories(work, share), count=share, leaders=1)
    read, rings = s.read_seconds(work, hardware, share=1 / share)
    seconds = _seconds(
        work,
        hardware,
        compute=s.compute_seconds(work, hardware) / share,
        weights=read * share,
        activations=rings + s.exchange_seconds(work, hardware, share),
    )
    return Plan("context", parallel, ranks, m.HOST_GIB * GIB, seconds, work.frames)


def zero3(work: Workload, hardware: HardwareConfig, parallel: ParallelConfig) -> Plan:
    """DeepSpeed's sharding: like fsdp by matrices, with its own bucket of prefetched weights."""
    like = replace(parallel, unshard_unit="linear", prefetch=0, replicas=1)
    plan = fsdp(work, hardware, like)
    bucket = ZERO_BUCKET * parallel.prefetch * work.dtype_bytes
    ranks = tuple(m.with_more(rank, unshard_prefetch=bucket) for rank in plan.ranks)
    return replace(plan, name=plan.name.replace("fsdp", "zero3"), parallel=parallel, ranks=ranks)


def offload(work: Workload, hardware: HardwareConfig, parallel: ParallelConfig) -> Plan:
    """One device: weights of most layers wait in host memory; several items share each pass over them."""
    options = parallel.offload
    together = 1 if work.clip_frames else options.inflight or work.steps
    memories, rings_away = _memories(work), 0.0
    if options.kv == "host":
        rings_away = memories["kv_rings"] + memories["memory_tokens"]
        one = (m.ring_bytes(work) + m.memory_bytes(work)) / work.steps
        memories = {"kv_rings": 2 * one, "memory_tokens": 0.0}  # of the item in work and of the next one
    busy = max(m.activation_bytes(work).values()) + (together - 1) * work.activation_bytes
    layers = [m.layer_bytes(work, range(layer, layer + 1)) for layer in range(work.model.trunk.num_layers)]
    rank = _rank(work, hardware, weights=m.end_bytes(work) + options.slots * max(layers), activations=busy, **memories)
    room = (hardware.usable_gib - SPARE_GIB) * GIB - sum(rank["generate"].values())
    number = int(max(0.0, room if options.resident_gib == -1 else options.resident_gib * GIB) // max(layers))
    stay = sum(layers[layer] for layer in resident_layers(len(layers), number))
    waiting = sum(layers) - stay
    rank = m.with_more(rank, weights=stay - (0 if waiting else options.slots * max(layers)))
    speed = hardware.disk_gbps if options.store == "mmap" else hardware.host_gbps
    seconds = _seconds(
        work,
        hardware,
        compute=s.compute_seconds(work, hardware),
        weights=s.forwards(work) / together * waiting / (speed * s.GIGA),
        activations=s.host_seconds(rings_away, hardware),
    )
    host = m.HOST_GIB * GIB + rings_away + (waiting if options.store == "pinned" else 0)
    name = f"offload{'+kv_host' if options.kv == 'host' else ''}{'+mmap' if options.store == 'mmap' else ''}"
    away = {f"of weights wait in {'their file' if options.store == 'mmap' else 'host memory'}": waiting,
            "of KV rings wait in host memory": rings_away}  # fmt: skip
    given_up = ", ".join(f"{size / GIB:.1f} GiB {where}" for where, size in away.items() if size)
    settled = replace(options, resident_gib=round(number * max(layers) / GIB + 0.001, 3), inflight=together)
    return Plan(name, replace(parallel, offload=settled), (rank,), host, seconds, work.frames, given_up=given_up)


def pipeline(work: Workload, hardware: HardwareConfig, parallel: ParallelConfig) -> Plan:
    """Ranks own ranges of blocks with their KV rings; the first also embeds and encodes, and decodes unless the last is there for
    that: as parallel.vae_rank says, or else where that fits and is faster."""
    first, *others = [_pipeline(work, hardware, way) for way in _ways(parallel) if not _stages_fault(way, work, hardware)]
    fitting = [plan for plan in others if not plan.missing_gib(hardware)]
    if not fitting:
        return first
    vae_apart, display_s = fitting[0], work.display_s
    faster = FASTER * max(vae_apart.seconds.total, display_s) < max(first.seconds.total, display_s)
    return vae_apart if faster or first.missing_gib(hardware) else first


def pipeline_fault(parallel: ParallelConfig, work: Workload, hardware: HardwareConfig) -> str:
    """The sentence for a pipeline that cannot be on these devices, in whichever way; empty when it can."""
    faults = [_stages_fault(way, work, hardware) for way in _ways(parallel)]
    return faults[0] if all(faults) else ""


def _ways(parallel: ParallelConfig) -> list[ParallelConfig]:
    """With the autoencoder on the first rank and on one of its own, or as it was asked for."""
    ways = (False, True) if parallel.vae_rank is None else (parallel.vae_rank,)
    return [replace(parallel, vae_rank=vae_apart) for vae_apart in ways if parallel.context == 1 or not vae_apart]


def _stages_fault(parallel: ParallelConfig, work: Workload, hardware: HardwareConfig) -> str:
    """What is wrong with the stages; empty when nothing is."""
    share, layers = degree(parallel, hardware), work.model.trunk.num_layers
    stages = hardware.devices // share - bool(parallel.vae_rank)
    if parallel.layers and (len(parallel.layers) != stages or sum(parallel.layers) != layers):
        return f"parallel.layers={parallel.layers} must be {stages} numbers whose sum is {layers}"
    if stages == 1 and not parallel.vae_rank:
        return "all ranks share the tokens, so that there is one stage; use context"
    if stages > 1 and work.clip_frames:
        return CLIPS_WAIT
    return f"{layers} blocks are fewer than {stages} stages" if layers < stages else ""


def _pipeline(work: Workload, hardware: HardwareConfig, parallel: ParallelConfig) -> Plan:
    """A pipeline with or without a rank for the autoencoder, which counts as one whose range is empty."""
    share, vae_apart = degree(parallel, hardware), bool(parallel.vae_rank)
    stages, layers = hardware.devices // share - vae_apart, work.model.trunk.num_layers
    times = [each / share for each in s.layer_seconds(work, hardware)]
    vae = s.vae_seconds(work, hardware) + s.link_seconds(m.frame_bytes(work) * vae_apart, hardware)
    split = Split(stages, share, vae_apart)
    ranges = ranges_of(parallel.layers or []) or _stage_ranges(work, hardware, times, split=split)
    ranks = [_stage(work, hardware, found, stage=stage, split=split) for stage, found in enumerate(ranges) for _ in range(share)]
    busiest = max(_over(times, found) for found in ranges)
    hops = s.link_seconds(s.forwards(work) * work.activation_bytes / share * (stages > 1), hardware)
    seconds = s.Seconds(
        compute=busiest,
        activations=hops + s.exchange_seconds(work, hardware, share) * max(len(found) for found in ranges) / layers,
        vae=max(0.0, (0.0 if vae_apart else _over(times, ranges[0])) + vae - busiest),
        first=s.before_seconds(work, hardware) + sum(times) + vae,
    )
    if work.clip_frames:  # there is one stage, and a clip is decoded when its denoising is over
        seconds = replace(seconds, vae=vae)
    name = f"pipeline{'+context' if share > 1 else ''}{'+vae_rank' if vae_apart else ''}"
    fixed = replace(parallel, layers=[len(found) for found in ranges])
    if vae_apart:
        frames = {"vae": m.vae_bytes(work), "activations": MESSAGES * m.frame_bytes(work)}
        ranks, ranges = [*ranks, m.video_phases(hardware, **frames)], [*ranges, range(layers, layers)]
    return Plan(name, fixed, tuple(ranks), m.HOST_GIB * GIB, seconds, work.frames, tuple(ranges))


PLANS: Mapping[str, Maker] = {
    "single": single,
    "fsdp": fsdp,
    "offload": offload,
    "pipeline": pipeline,
    "context": context,
    "zero3": zero3,
}


def degree(parallel: ParallelConfig, hardware: HardwareConfig) -> int:
    """Ranks that share the tokens of one video."""
    return hardware.devices // max(1, parallel.replicas) if parallel.context == -1 else parallel.context


def _memories(work: Workload, share: int = 1) -> dict[str, float]:
    layers = work.model.trunk.num_layers
    return {"kv_rings": layers * m.ring_bytes(work) / share, "memory_tokens": layers * m.memory_bytes(work) / share}


def _rank(work: Workload, hardware: HardwareConfig, *, activations: float, **generation: float) -> Phases:
    """A rank that also encodes and decodes."""
    vae = m.vae_bytes(work, idle=activations)
    return m.video_phases(hardware, first=m.encoder_bytes(work), vae=vae, activations=activations, **generation)


def _ranks(work: Workload, hardware: HardwareConfig, generation: Mapping[str, float], *, count: int, leaders: int) -> tuple[Phases, ...]:
    """Equal ranks, of which the first of every group also encodes and decodes."""
    leader, follower = _rank(work, hardware, **generation), m.video_phases(hardware, **generation)
    return tuple(leader if rank % (count // leaders) == 0 else follower for rank in range(count))


class Split(NamedTuple):
    """How many stages a pipeline has, how many ranks share the tokens in each, and whether the autoencoder is elsewhere."""

    stages: int
    share: int = 1
    vae_apart: bool = False


def _stage(work: Workload, hardware: HardwareConfig, layers: range, *, stage: int, split: Split) -> Phases:
    """One stage of a pipeline."""
    first, share = stage == 0, split.share
    busy = m.activation_bytes(work, share=share)
    phases = [busy[name] for name in ("attention", "mlp", *(("ends",) if first else ()))]
    activations = max(phases) if len(layers) or first else work.activation_bytes / share
    incoming = MESSAGES * work.activation_bytes / share * (split.stages > 1) + m.frame_bytes(work) * (first and split.vae_apart)
    generation = {
        "weights": m.layer_bytes(work, layers) + m.end_bytes(work) * first,
        "kv_rings": len(layers) * m.ring_bytes(work) / share,
        "memory_tokens": len(layers) * m.memory_bytes(work) / share,
        "activations": activations + incoming,
        "vae": m.vae_bytes(work, idle=activations) if first and not split.vae_apart else 0.0,
    }
    return m.video_phases(hardware, first=m.encoder_bytes(work) if first else None, **generation)


def _stage_ranges(work: Workload, hardware: HardwareConfig, times: Sequence[float], *, split: Split) -> list[range]:
    """Ranges that are as fast as can be within the memory there is; of those faster than the video is shown, the leanest."""
    layers, stages = len(times), split.stages
    memories = (m.ring_bytes(work) + m.memory_bytes(work)) / split.share
    sizes = [m.layer_bytes(work, range(layer, layer + 1)) + memories for layer in range(layers)]
    one = range(layers - 1, layers)
    ends = [_stage(work, hardware, one, stage=stage, split=split) for stage in range(stages)]
    empty = [sum(rank["generate"].values()) - sizes[-1] for rank in ends]
    vae = 0.0 if split.vae_apart else s.vae_seconds(work, hardware)

    def size(stage: int, found: range) -> float:
        return empty[stage] + _over(sizes, found)

    def time(stage: int, found: range) -> float:
        return _over(times, found) + vae * (stage == 0)

    for limit in ((1 - MARGIN) * hardware.usable_gib * GIB, hardware.usable_gib * GIB):
        fast = lambda stage, found: time(stage, found) if size(stage, found) <= limit else inf  # noqa: B023, E731
        ranges = best_ranges(layers, stages, fast)
        slowest = max(fast(stage, found) for stage, found in enumerate(ranges))
        if slowest < inf:
            enough = 1.0001 * max(slowest, work.display_s)
            return best_ranges(layers, stages, lambda stage, found: size(stage, found) if time(stage, found) <= enough else inf)  # noqa: B023
    return best_ranges(layers, stages, size)


def _over(values: Sequence[float], layers: range) -> float:
    return sum(values[layers.start : layers.stop])


def _seconds(work: Workload, hardware: HardwareConfig, **parts: float) -> s.Seconds:
    """Times of a plan whose ranks work on one hand-over together."""
    vae = s.vae_seconds(work, hardware)
    found = s.Seconds(vae=vae, **parts)
    return replace(found, first=s.before_seconds(work, hardware) + found.total)
