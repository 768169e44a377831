"""Predicts memory and time of a video under each plan on given hardware, one function per plan. Nothing is executed."""

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

ZERO_BUCKET = 50_000_000  # parameters that DeepSpeed gathers ahead per unit of parallel.prefetch
MESSAGES = 2  # activations buffered between two stages: one received, one not sent yet
MARGIN = 0.05  # fraction of device memory that layer ranges leave free if possible: the error of predictions
FASTER = 1.0001  # least speed-up that justifies a rank for the autoencoder; less is rounding error
CLIPS_WAIT = (
    "it runs videos block by block; a clip with full attention is one forward after the other, "
    "so ranks would wait for each other: use parallel=fsdp with parallel.context=-1"
)
SPARE_GIB = 0.2  # left free by an offloading plan, in case the prediction is slightly too low


@dataclass(frozen=True)
class Plan:
    """A way to run a job, with its predicted memory and time.

    `ranks` has the bytes of every rank by phase and item, `host` the bytes of host memory per rank, `frames` the frames of one `unit`
    (a block of a video, or a step of a training), `given_up` what was moved to host memory or disk, `options` the command-line options
    that select this plan."""

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
        """Phases of the rank with the highest peak."""
        return max(self.ranks, key=m.peak)

    @property
    def phase(self) -> str:
        """Name of the largest phase of that rank."""
        return max(self.fullest, key=lambda phase: sum(self.fullest[phase].values()))

    @property
    def peak_gib(self) -> list[float]:
        """Peak of every rank in GiB."""
        return [m.peak(rank) / GIB for rank in self.ranks]

    @property
    def frames_per_second(self) -> float:
        """Frames per second of one video, or of all samples of a training step."""
        return self.frames / self.seconds.total

    @property
    def uses_host_memory(self) -> bool:
        """Whether weights or KV rings are moved to host memory (or to disk) to save device memory."""
        return bool(self.given_up) or self.parallel.cpu_offload

    def missing_gib(self, hardware: HardwareConfig) -> float:
        """GiB that the rank with the highest peak, or host memory, lacks; 0 when the plan fits."""
        device = max(self.peak_gib) - hardware.usable_gib
        host = self.host * len(self.ranks) / GIB - hardware.host_gib
        return max(0.0, device, host)


Maker = Callable[[Workload, HardwareConfig, ParallelConfig], Plan]


def single(work: Workload, hardware: HardwareConfig, parallel: ParallelConfig) -> Plan:
    """Plan of one device that holds all weights and KV rings."""
    busy = max(m.activation_bytes(work).values())
    rank = _rank(work, hardware, weights=m.model_bytes(work), activations=busy, **_memories(work))
    weights, rings = s.read_seconds(work, hardware)
    seconds = _seconds(work, hardware, compute=s.compute_seconds(work, hardware), weights=weights, activations=rings)
    return Plan("single", parallel, (rank,), m.HOST_GIB * GIB, seconds, work.frames)


def fsdp(work: Workload, hardware: HardwareConfig, parallel: ParallelConfig) -> Plan:
    """Plan with weights sharded over all ranks; groups of `parallel.context` ranks divide the tokens of one video."""
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
    """Plan in which every rank holds all weights and computes a share of each frame's tokens."""
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
    """Plan with DeepSpeed ZeRO-3: as `fsdp` with units of one matrix, plus DeepSpeed's buffer of prefetched weights."""
    like = replace(parallel, unshard_unit="linear", prefetch=0, replicas=1)
    plan = fsdp(work, hardware, like)
    bucket = ZERO_BUCKET * parallel.prefetch * work.dtype_bytes
    ranks = tuple(m.with_more(rank, unshard_prefetch=bucket) for rank in plan.ranks)
    return replace(plan, name=plan.name.replace("fsdp", "zero3"), parallel=parallel, ranks=ranks)


def offload(work: Workload, hardware: HardwareConfig, parallel: ParallelConfig) -> Plan:
    """Plan of one device with most layers' weights in host memory; `inflight` forwards run through each layer while it is loaded."""
    options = parallel.offload
    together = 1 if work.clip_frames else options.inflight or work.steps
    memories, rings_away = _memories(work), 0.0
    if options.kv == "host":
        rings_away = memories["kv_rings"] + memories["memory_tokens"]
        one = (m.ring_bytes(work) + m.memory_bytes(work)) / work.steps
        memories = {"kv_rings": 2 * one, "memory_tokens": 0.0}  # rings of the current forward and of the next one
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
    """Plan in which each rank has a range of blocks and their KV rings; the first rank also has the embeddings and the encoders.

    The first rank also decodes, unless the last rank has the autoencoder. parallel.vae_rank decides which; when it is None, the
    autoencoder has its own rank if that fits and is faster, or if it is the only way that fits."""
    first, *others = [_pipeline(work, hardware, way) for way in _ways(parallel) if not _stages_fault(way, work, hardware)]
    fitting = [plan for plan in others if not plan.missing_gib(hardware)]
    if not fitting:
        return first
    vae_apart, display_s = fitting[0], work.display_s
    faster = FASTER * max(vae_apart.seconds.total, display_s) < max(first.seconds.total, display_s)
    return vae_apart if faster or first.missing_gib(hardware) else first


def pipeline_fault(parallel: ParallelConfig, work: Workload, hardware: HardwareConfig) -> str:
    """The reason why these devices cannot run a pipeline, with or without a rank for the autoencoder; "" when they can."""
    faults = [_stages_fault(way, work, hardware) for way in _ways(parallel)]
    return faults[0] if all(faults) else ""


def _ways(parallel: ParallelConfig) -> list[ParallelConfig]:
    """Configs with the autoencoder on the first rank and on its own rank, or only the one that parallel.vae_rank selects."""
    ways = (False, True) if parallel.vae_rank is None else (parallel.vae_rank,)
    return [replace(parallel, vae_rank=vae_apart) for vae_apart in ways if parallel.context == 1 or not vae_apart]


def _stages_fault(parallel: ParallelConfig, work: Workload, hardware: HardwareConfig) -> str:
    """The reason why the pipeline cannot have these stages; "" when it can."""
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
    """Plan of a pipeline; a rank for the autoencoder is a last rank with an empty range of layers."""
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
    if work.clip_frames:  # there is one stage, and a clip is decoded only after its denoising
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
    """Number of ranks that divide the tokens of one video."""
    return hardware.devices // max(1, parallel.replicas) if parallel.context == -1 else parallel.context


def _memories(work: Workload, share: int = 1) -> dict[str, float]:
    layers = work.model.trunk.num_layers
    return {"kv_rings": layers * m.ring_bytes(work) / share, "memory_tokens": layers * m.memory_bytes(work) / share}


def _rank(work: Workload, hardware: HardwareConfig, *, activations: float, **generation: float) -> Phases:
    """Phases of a rank that also has the encoders and the autoencoder."""
    vae = m.vae_bytes(work, idle=activations)
    return m.video_phases(hardware, first=m.encoder_bytes(work), vae=vae, activations=activations, **generation)


def _ranks(work: Workload, hardware: HardwareConfig, generation: Mapping[str, float], *, count: int, leaders: int) -> tuple[Phases, ...]:
    """Phases of `count` ranks in `leaders` equal groups; the first rank of each group also has the encoders and the autoencoder."""
    leader, follower = _rank(work, hardware, **generation), m.video_phases(hardware, **generation)
    return tuple(leader if rank % (count // leaders) == 0 else follower for rank in range(count))


class Split(NamedTuple):
    """Number of stages of a pipeline, ranks that divide the tokens in each stage, and whether the autoencoder has its own rank."""

    stages: int
    share: int = 1
    vae_apart: bool = False


def _stage(work: Workload, hardware: HardwareConfig, layers: range, *, stage: int, split: Split) -> Phases:
    """Phases of a rank in one stage of a pipeline."""
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
    """The layer ranges with the least time of the slowest stage that fit in memory.

    Among ranges that generate faster than the video is displayed (or as fast as the best), the one with the lowest peak is taken."""
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
    """Times of a plan in which all ranks work on the same hand-over."""
    vae = s.vae_seconds(work, hardware)
    found = s.Seconds(vae=vae, **parts)
    return replace(found, first=s.before_seconds(work, hardware) + found.total)
