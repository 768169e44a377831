"""Predicts memory and time of a training under FSDP, lists the configs to try, and the changes that reduce its memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import product

from sonic.model.counts import block_multiply_adds, forward_multiply_adds
from sonic.parallel.parallel_config import HardwareConfig, ParallelConfig
from sonic.planner import step_time as s
from sonic.planner.memory import GIB, HOST_GIB
from sonic.planner.plans import Plan
from sonic.planner.training_memory import host_bytes, phases, sizes
from sonic.planner.workload import Training

SMALLEST_RANK = 8
UPDATE_BYTES = 28  # that AdamW reads and writes per parameter
HOST_MEMORY_GBPS = 40  # bandwidth of host memory, for all ranks together

Changed = Iterator[tuple[str, tuple[str, ...], Training]]  # a sentence, the options that make this change, the changed job


def training_plan(work: Training, hardware: HardwareConfig, parallel: ParallelConfig) -> Plan:
    """Plan with FSDP2 over all ranks; groups of `parallel.context` ranks divide the tokens of a batch."""
    name = f"fsdp{'+context' if parallel.context > 1 else ''}{'+cpu_offload' if parallel.cpu_offload else ''}"
    host = HOST_GIB * GIB + (host_bytes(work, hardware.devices) if parallel.cpu_offload else 0)
    ranks = (phases(work, hardware, parallel),) * hardware.devices
    seconds = _seconds(work, hardware, parallel)
    options = ["speed.engine=fsdp"]
    options += [f"speed.context={parallel.context}"] * (parallel.context > 1)
    options += ["speed.cpu_offload=true"] * parallel.cpu_offload
    found = Plan(name, parallel, ranks, host, replace(seconds, first=seconds.total), work.frames)
    return replace(found, unit="step", options=tuple(options))


def candidates(asked: ParallelConfig, work: Training, hardware: HardwareConfig, *, idle: bool = True) -> Iterator[ParallelConfig]:
    """The configs to try: the named one, or for auto every possible combination of token sharing and cpu_offload.

    `idle` has no effect: no config leaves a device idle. Raises ValueError when no config is possible, or another plan is named."""
    devices = hardware.devices
    if asked.name not in ("auto", "fsdp"):
        raise ValueError(f"parallel={asked.name}: trainings are planned for fsdp alone; leave it out, or use parallel=fsdp")
    if asked.name == "fsdp":
        share = devices if asked.context == -1 else asked.context
        sentence = why_not(work, devices, share)
        if sentence:
            raise ValueError(sentence)
        yield replace(asked, context=share)
        return
    shares = [share for share in (1, 2, 4, 8) if not why_not(work, devices, share)]
    if not shares:
        raise ValueError(why_not(work, devices, 1))
    for share, offload in product(shares, (False, True)):
        yield replace(asked, name="fsdp", context=share, cpu_offload=offload)


def why_not(work: Training, devices: int, share: int) -> str:
    """The reason why tokens and batches cannot be divided so among the devices; "" when they can."""
    heads, (rows, columns) = work.model.trunk.num_heads, work.grid
    if devices % share or heads % share or rows * columns % share:
        whole = f"{heads} heads and {rows * columns} tokens of a frame evenly on {devices} devices"
        return f"parallel.context={share}: {share} ranks cannot share {whole}; use 1"
    readers, batches = devices // share, work.job.accumulate
    if not batches % readers:
        return ""
    below = batches // readers * readers
    return f"budget.accumulate={batches} cannot be shared by {readers}; use {f'{below} or ' if below else ''}{below + readers}"


def instead(parallel: ParallelConfig, asked: ParallelConfig) -> tuple[str, ...]:
    """The command-line options that select this config."""
    return ("parallel=auto", f"speed.context={parallel.context}", f"speed.cpu_offload={str(parallel.cpu_offload).lower()}")


def _seconds(work: Training, hardware: HardwareConfig, parallel: ParallelConfig) -> s.Seconds:
    """Seconds of a step: forwards, recomputed layers and gradients; and the communication of each pass over the weights."""
    forwards, passes, gradients = PASSES[work.job.objective](work)
    share, ranks = parallel.context, hardware.devices
    batches = work.job.accumulate // (ranks // share)  # that a rank computes one after the other
    size = sizes(work, ranks)
    model = size.root + sum(numbers for _, numbers in size.units)
    moved = passes * model + gradients * 4 * sum(size.learnt.values())
    weights = s.link_seconds(moved * (ranks - 1) / ranks, hardware)
    updates = work.job.critic_turns + 1 if work.job.objective == "dmd" else 1
    stepping = 0.0
    if parallel.cpu_offload:  # shards and gradients share the bus to the host, where the optimizer runs
        weights += s.host_seconds((passes * model + 4 * gradients * sum(size.learnt.values())) / ranks, hardware)
        stepping = updates * UPDATE_BYTES * sum(size.learnt.values()) / (HOST_MEMORY_GBPS * s.GIGA)
    exchanged = 4 * forwards * work.clip * work.token_bytes * work.model.trunk.num_layers / share * (share - 1) / share
    operations = 2 * forwards * _forward(work) * work.job.batch_size / share
    compute, activations = operations / s.rate(hardware), s.link_seconds(exchanged, hardware)
    return s.Seconds(compute=batches * compute, weights=batches * weights + stepping, activations=batches * activations)


def _flow_match_passes(work: Training) -> tuple[float, float, float]:
    """(forwards of a clip, passes over the weights, gradient reductions) per batch; a backward pass counts as two forwards."""
    again = 1 if work.job.recompute else 0
    return 3 + again, 2, 1


def _dmd_passes(work: Training) -> tuple[float, float, float]:
    """As `_flow_match_passes` for DMD: the critic's updates, each with a rollout, and the student's update with a rollout, forwards of
    teacher and critic, and a replay of the rollout with gradients."""
    job, blocks = work.job, work.blocks
    again, guided = 1 if job.recompute else 0, 2 if job.teacher_guide_scale != 1 else 1
    block = block_multiply_adds(work.model, work.grid, blocks=work.model.rollout.window_blocks) / _forward(work)
    rollout = job.steps * blocks * block
    critic, student = rollout + 2 + again, rollout + 1 + guided + blocks * block * (2 + again)
    passes = job.critic_turns * (job.steps * blocks + 3) + job.steps * blocks + 1 + 1 + guided + 1 + 2 * blocks
    return job.critic_turns * critic + student, passes, job.critic_turns + blocks


PASSES: Mapping[str, Callable[[Training], tuple[float, float, float]]] = {"dmd": _dmd_passes, "flow_match": _flow_match_passes}


def _forward(work: Training) -> int:
    """Multiply-adds of the forward of one sample as a clip."""
    return forward_multiply_adds(work.model, work.latent_frames, work.grid, motion=work.motion)


def smaller_batches(work: Training) -> Changed:
    """Changes to smaller batches."""
    size = work.job.batch_size
    for fewer in range(size - 1, 0, -1):
        yield f"{fewer} samples at once instead of {size}", (f"budget.batch_size={fewer}",), _changed(work, batch_size=fewer)


def recomputing(work: Training) -> Changed:
    """The change to recompute layers in the backward pass."""
    if not work.job.recompute:
        sentence = "layers made again for the gradient instead of remembered"
        yield sentence, ("speed.recompute=true",), _changed(work, recompute=True)


def smaller_adapters(work: Training) -> Changed:
    """Changes to adapters of half the rank, a quarter, and so on, down to SMALLEST_RANK."""
    learn = work.job.learn
    rank = learn.rank // 2
    while rank >= SMALLEST_RANK:
        smaller = _changed(work, learn=replace(learn, rank=rank))
        yield f"adapters of rank {rank} instead of {learn.rank}", (f"objective.learn.rank={rank}",), smaller
        rank //= 2


def shorter_samples(work: Training) -> Changed:
    """Changes to fewer latent frames per sample; for DMD a whole number of blocks."""
    job, step = work.job, work.model.rollout.block_frames if work.job.objective == "dmd" else 1
    for fewer in range(job.window - step, job.past, -step):
        yield f"samples of {fewer} latent frames instead of {job.window}", (f"data.window={fewer}",), _changed(work, window=fewer)


def _changed(work: Training, **changes: object) -> Training:
    return replace(work, job=replace(work.job, **changes))
