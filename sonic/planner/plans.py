"""Predicts memory and time of a video under each plan on given hardware, one function per plan. Nothing is executed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from pkgutil import resolve_name
from typing import NamedTuple

from sonic.parallel.layer_ranges import best_ranges, ranges_of, resident_layers
from sonic.parallel.parallel_config import MESSAGES, PLANS, HardwareConfig, ParallelConfig
from sonic.planner import memory as m
from sonic.planner import step_time as s
from sonic.planner.memory import GIB, Phases
from sonic.planner.workload import Workload

ZERO_BUCKET = 50_000_000  # parameters that DeepSpeed gathers ahead per unit of parallel.prefetch
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


def estimated(work: Workload, hardware: HardwareConfig, parallel: ParallelConfig) -> Plan:
    """The plan of a video under these options, by the function that PLANS names."""
    return resolve_name(f"{__name__}:{PLANS[parallel.name].estimate}")(work, hardware, parallel)


def whole_model(work: Workload, hardware: HardwareConfig, parallel: ParallelConfig) -> Plan:
    """Plan in which a rank holds all weights: one rank alone, or all ranks, each of which computes a share of each frame's tokens."""
    share = 1 if PLANS[parallel.name].one_rank else hardware.devices
    items = {"weights": m.model_bytes(work), "activations": max(m.activation_bytes(work, share=share).values())}
    ranks = _ranks(work, hardware, items, count=share, share=share)
    return Plan(parallel.name, parallel, ranks, m.HOST_GIB * GIB, _shared_seconds(work, hardware, share), work.frames)


def sharded(work: Workload, hardware: HardwareConfig, parallel: ParallelConfig) -> Plan:
    """Plan with weights sharded over all ranks; groups of `parallel.context` ranks divide the tokens of one video."""
    share, away = token_ranks(parallel, hardware), parallel.cpu_offload
    shards = hardware.devices // max(1, parallel.replicas)
    busy = m.activation_bytes(work, share=share)
    gathered = m.gathered_bytes(work, parallel, shards)
    phase = max(gathered, key=lambda name: gathered[name] + busy[name])
    piece = m.slice_bytes(work, shards)
    weights = m.whole_bytes(work) + (0 if away else piece)
    items = {"weights": weights, "unshard_prefetch": gathered[phase], "activations": busy[phase]}
    moved = s.link_seconds(m.model_bytes(work) * (shards - 1) / shards, hardware)
    seconds = _shared_seconds(work, hardware, share, copying=max(moved, s.host_seconds(piece, hardware) if away else 0.0))
    host = m.HOST_GIB * GIB + (piece if away else 0.05 * piece)
    ranks = _ranks(work, hardware, items, count=hardware.devices, share=share)
    return Plan(full_name(parallel, share), parallel, ranks, host, seconds, work.frames)


def zero3(work: Workload, hardware: HardwareConfig, parallel: ParallelConfig) -> Plan:
    """Plan with DeepSpeed ZeRO-3: as `sharded` with units of one matrix, plus DeepSpeed's buffer of prefetched weights."""
    plan = sharded(work, hardware, replace(parallel, unshard_unit="linear", prefetch=0, replicas=1))
    bucket = ZERO_BUCKET * parallel.prefetch * work.dtype_bytes
    return replace(plan, parallel=parallel, ranks=tuple(m.with_more(rank, unshard_prefetch=bucket) for rank in plan.ranks))


def offloaded(work: Workload, hardware: HardwareConfig, parallel: ParallelConfig) -> Plan:
    """Plan of one device with most layers' weights in host memory; `inflight` forwards run through each layer while it is loaded."""
    options = parallel.offload
    together = 1 if work.clip_frames else options.inflight or work.steps
    memories, rings_away, rings_moved = _memories(work), 0.0, 0.0
    if options.kv == "host":  # on the device are a ring of the layer that runs and one of the next layer, and the prompt
        ring, prompt = 2 * (work.window + work.memory) * work.token_bytes, work.model.trunk.num_layers * m.prompt_bytes(work)
        rings_away, rings_moved = sum(memories.values()) - prompt, s.forwards(work) * work.model.trunk.num_layers * ring
        memories = {"kv_rings": 2 * ring, "memory_tokens": prompt}
    busy = max(m.activation_bytes(work).values()) + (together - 1) * work.stream_bytes
    layers = [m.layer_bytes(work, range(layer, layer + 1)) for layer in range(work.model.trunk.num_layers)]
    rank = _leader(work, hardware, {"weights": m.end_bytes(work) + options.slots * max(layers), "activations": busy, **memories})
    room = (hardware.usable_gib - SPARE_GIB) * GIB - sum(rank["generate"].values())
    number = int(max(0.0, room if options.resident_gib == -1 else options.resident_gib * GIB) // max(layers))
    stay = sum(layers[layer] for layer in resident_layers(len(layers), number))
    waiting = sum(layers) - stay
    rank = m.with_more(rank, weights=stay - (0 if waiting else options.slots * max(layers)))
    seconds = s.Seconds(
        compute=s.compute_seconds(work, hardware),
        weights=s.forwards(work) / together * waiting / s.GIGA / (hardware.disk_gbps if options.store == "mmap" else hardware.host_gbps),
        activations=s.host_seconds(rings_moved, hardware),
    )
    host = m.HOST_GIB * GIB + rings_away + (waiting if options.store == "pinned" else 0)
    name = f"offload{'+kv_host' if options.kv == 'host' else ''}{'+mmap' if options.store == 'mmap' else ''}"
    away = {f"of weights wait in {'their file' if options.store == 'mmap' else 'host memory'}": waiting,
            "of KV rings wait in host memory": rings_away}  # fmt: skip
    given_up = ", ".join(f"{size / GIB:.1f} GiB {where}" for where, size in away.items() if size)
    settled = replace(options, resident_gib=round(number * max(layers) / GIB + 0.001, 3), inflight=together)
    seconds = s.with_decoding(work, hardware, seconds)
    return Plan(name, replace(parallel, offload=settled), (rank,), host, seconds, work.frames, given_up=given_up)


def stages(work: Workload, hardware: HardwareConfig, parallel: ParallelConfig) -> Plan:
    """Plan of a pipeline: each rank has a range of blocks and their KV rings, the first also the embeddings and the encoders.

    The first rank also decodes, unless the last rank has the autoencoder. parallel.vae_rank decides which; when it is None, the
    autoencoder has its own rank if that fits and is faster, or if it is the only way that fits."""
    first, *others = [_stages(work, hardware, way) for way in _ways(parallel) if not _stages_fault(way, work, hardware)]
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


class Split(NamedTuple):
    """Number of stages of a pipeline, ranks that divide the tokens in each stage, and whether the autoencoder has its own rank."""

    stages: int
    share: int = 1
    vae_apart: bool = False


def _split(parallel: ParallelConfig, hardware: HardwareConfig) -> Split:
    share, vae_apart = token_ranks(parallel, hardware), bool(parallel.vae_rank)
    return Split(hardware.devices // share - vae_apart, share, vae_apart)


def _stages_fault(parallel: ParallelConfig, work: Workload, hardware: HardwareConfig) -> str:
    """The reason why the pipeline cannot have these stages; "" when it can."""
    count, layers = _split(parallel, hardware).stages, work.model.trunk.num_layers
    if parallel.layers and (len(parallel.layers) != count or sum(parallel.layers) != layers):
        return f"parallel.layers={parallel.layers} must be {count} numbers whose sum is {layers}"
    if count == 1 and not parallel.vae_rank:
        return "all ranks share the tokens, so that there is one stage; use context"
    if count > 1 and work.clip_frames:
        return CLIPS_WAIT
    return f"{layers} blocks are fewer than {count} stages" if layers < count else ""


def _stages(work: Workload, hardware: HardwareConfig, parallel: ParallelConfig) -> Plan:
    """Plan of a pipeline; a rank for the autoencoder is a last rank with an empty range of layers."""
    split, layers = _split(parallel, hardware), work.model.trunk.num_layers
    times = [each / split.share for each in s.layer_seconds(work, hardware)]
    vae = s.vae_seconds(work, hardware) + s.link_seconds(m.frame_bytes(work) * split.vae_apart, hardware)
    ranges = ranges_of(parallel.layers or []) or _stage_ranges(work, hardware, times, split=split)
    ranks = [_stage(work, hardware, found, stage=stage, split=split) for stage, found in enumerate(ranges) for _ in range(split.share)]
    busiest = max(_over(times, found) for found in ranges)
    hops = s.link_seconds(s.forwards(work) * work.stream_bytes / split.share * (split.stages > 1), hardware)
    seconds = s.Seconds(
        compute=busiest,
        activations=hops + s.exchange_seconds(work, hardware, split.share) * max(len(found) for found in ranges) / layers,
        vae=max(0.0, (0.0 if split.vae_apart else _over(times, ranges[0])) + vae - busiest),
        first=s.before_seconds(work, hardware) + sum(times) + vae,
    )
    if work.clip_frames:  # there is one stage, and a clip is decoded only after its denoising
        seconds = replace(seconds, vae=vae)
    name = f"pipeline{'+context' if split.share > 1 else ''}{'+vae_rank' if split.vae_apart else ''}"
    fixed = replace(parallel, layers=[len(found) for found in ranges])
    if split.vae_apart:
        frames = {"vae": m.vae_bytes(work), "activations": MESSAGES * m.frame_bytes(work)}
        ranks, ranges = [*ranks, m.video_phases(hardware, **frames)], [*ranges, range(layers, layers)]
    return Plan(name, fixed, tuple(ranks), m.HOST_GIB * GIB, seconds, work.frames, tuple(ranges))


def token_ranks(parallel: ParallelConfig, hardware: HardwareConfig) -> int:
    """Number of ranks that divide the tokens of one video."""
    return hardware.devices // max(1, parallel.replicas) if parallel.context == -1 else parallel.context


def full_name(parallel: ParallelConfig, share: int) -> str:
    """The name of a plan with sharded weights: also whether there are copies, ranks divide tokens, and shards are in host memory."""
    also = {"replicas": parallel.replicas > 1, "context": share > 1, "cpu_offload": parallel.cpu_offload}
    return "+".join((parallel.name, *(name for name, used in also.items() if used)))


def _memories(work: Workload, share: int = 1) -> dict[str, float]:
    layers = work.model.trunk.num_layers
    return {"kv_rings": layers * m.ring_bytes(work) / share, "memory_tokens": layers * m.memory_bytes(work) / share}


def _leader(work: Workload, hardware: HardwareConfig, generation: Mapping[str, float]) -> Phases:
    """Phases of a rank that also has the encoders and the autoencoder."""
    vae = m.vae_bytes(work, idle=generation["activations"] + generation.get("unshard_prefetch", 0.0))
    return m.video_phases(hardware, first=m.encoder_bytes(work), vae=vae, **generation)


def _ranks(work: Workload, hardware: HardwareConfig, items: Mapping[str, float], *, count: int, share: int) -> tuple[Phases, ...]:
    """Phases of `count` ranks; the first of every `share` ranks, which make a video together, has the encoders and the autoencoder."""
    generation = {**items, **_memories(work, share)}
    leader, follower = _leader(work, hardware, generation), m.video_phases(hardware, **generation)
    return tuple(follower if rank % share else leader for rank in range(count))


def _shared_seconds(work: Workload, hardware: HardwareConfig, share: int, *, copying: float = 0.0) -> s.Seconds:
    """Times when `share` ranks divide the tokens; `copying` is the seconds in which a rank gets the weights of a forward from elsewhere."""
    forwards, rings = s.forwards(work), work.model.trunk.num_layers * m.ring_bytes(work)
    seconds = s.Seconds(
        compute=s.compute_seconds(work, hardware) / share,
        weights=forwards * max(copying, s.memory_seconds(m.model_bytes(work), hardware)),
        activations=s.memory_seconds(rings / share, hardware) + s.exchange_seconds(work, hardware, share),
    )
    return s.with_decoding(work, hardware, seconds)


def _stage(work: Workload, hardware: HardwareConfig, layers: range, *, stage: int, split: Split) -> Phases:
    """Phases of a rank in one stage of a pipeline."""
    first, share = stage == 0, split.share
    busy = m.activation_bytes(work, share=share)
    phases = [busy[name] for name in ("attention", "mlp", *(("ends",) if first else ()))]
    activations = max(phases) if len(layers) or first else work.stream_bytes / share
    incoming = MESSAGES * work.stream_bytes / share * (split.stages > 1) + m.frame_bytes(work) * (first and split.vae_apart)
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
