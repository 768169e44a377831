"""Predicts memory and time of a training under FSDP, lists the configs to try, and the changes that reduce its memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import NamedTuple

from sonic.parallel.parallel_config import HardwareConfig, ParallelConfig
from sonic.planner import step_time as s
from sonic.planner.memory import GIB, HOST_GIB
from sonic.planner.plans import Plan, divisors, full_name
from sonic.planner.training_memory import host_bytes, phases, sizes
from sonic.planner.video_candidates import smaller_sizes
from sonic.planner.workload import Training, learnt

SMALLEST_RANK = 8
UPDATE_BYTES = 28  # that AdamW reads and writes per parameter
HOST_MEMORY_GBPS = 40  # bandwidth of host memory, for all ranks together

Changed = Iterator[tuple[str, tuple[str, ...], Training]]  # a sentence, the options that make this change, the changed job


def plan(work: Training, hardware: HardwareConfig, parallel: ParallelConfig) -> Plan:
    """Plan with FSDP2 over the ranks of each of `parallel.replicas` groups; `parallel.context` ranks divide the tokens of a batch."""
    share, away, copies = parallel.context, parallel.cpu_offload, parallel.replicas
    host = HOST_GIB * GIB + (host_bytes(work, hardware.ranks // copies) if away else 0)
    ranks = (phases(work, hardware, parallel),) * hardware.ranks
    degrees = {"context": share, "replicas": copies}
    options = ("speed.engine=fsdp", *(f"speed.{name}={degree}" for name, degree in degrees.items() if degree > 1))
    options += ("speed.cpu_offload=true",) * away + ("speed.reshard=false",) * (not parallel.reshard)
    seconds, frames = _seconds(work, hardware, parallel), work.frames * work.batch_size * work.recipe.budget.accumulate
    return Plan(full_name(parallel, share), parallel, ranks, host, seconds, frames, unit="step", options=options)


def candidates(asked: ParallelConfig, work: Training, hardware: HardwareConfig) -> Iterator[ParallelConfig]:
    """The configs to try: the named one, or for auto every possible combination of token sharing, copies and cpu_offload.

    Raises ValueError when no config is possible, or another plan is named."""
    devices = hardware.ranks
    if asked.name not in ("auto", "fsdp"):
        raise ValueError(f"parallel={asked.name}: trainings are planned for fsdp alone; leave it out, or use parallel=fsdp")
    if asked.name == "fsdp":
        left = devices // (max(1, asked.context) * max(1, asked.replicas))
        share, copies = (left if degree == -1 else degree for degree in (asked.context, asked.replicas))
        sentence = why_not(work, devices, share, copies=copies)
        if sentence:
            raise ValueError(sentence)
        yield replace(asked, context=share, replicas=copies)
        return
    copies = (asked.replicas,) if asked.replicas > 1 else dict.fromkeys((1, hardware.nodes))
    possible = [each for each in product(divisors(devices), copies) if not why_not(work, devices, each[0], copies=each[1])]
    if not possible:
        raise ValueError(why_not(work, devices, 1, copies=max(1, asked.replicas)))
    for (share, replicas), offload in product(possible, (False, True)):
        yield replace(asked, name="fsdp", context=share, replicas=replicas, cpu_offload=offload)


def why_not(work: Training, devices: int, share: int, *, copies: int = 1) -> str:
    """The reason why weights, tokens and batches cannot be divided so among the devices; "" when they can."""
    heads, (rows, columns) = work.model.trunk.num_heads, work.grid
    if devices % copies or devices // copies % share:
        fits = [number for number in range(1, devices + 1) if devices % number == 0]
        asked = f"parallel.replicas={copies} and parallel.context={share}"
        return f"{asked} do not divide {devices} devices; choose degrees whose product is one of {fits}"
    if devices % share or heads % share or rows * columns % share:
        whole = f"{heads} heads and {rows * columns} tokens of a frame evenly on {devices} devices"
        return f"parallel.context={share}: {share} ranks cannot share {whole}; use 1"
    readers, batches = devices // share, work.recipe.budget.accumulate
    if not batches % readers:
        return ""
    below = batches // readers * readers
    return f"budget.accumulate={batches} cannot be shared by {readers}; use {f'{below} or ' if below else ''}{below + readers}"


def instead(parallel: ParallelConfig, asked: ParallelConfig) -> tuple[str, ...]:
    """The command-line options that select this config."""
    options = {name: getattr(parallel, name) for name in ("context", "replicas", "cpu_offload", "reshard")}
    return ("parallel=auto", *(f"speed.{name}={str(value).lower()}" for name, value in options.items()))


def _seconds(work: Training, hardware: HardwareConfig, parallel: ParallelConfig) -> s.Seconds:
    """Seconds of a step: forwards, recomputed layers and gradients; and the communication of each pass over the weights.

    The ranks of a group gather weights and reduce gradients; between the groups the sums of each shard are averaged."""
    count, share, budget = (_dmd_passes if work.distils else _flow_match_passes)(work), parallel.context, work.recipe.budget
    copies, shards = parallel.replicas, hardware.ranks // parallel.replicas
    size, learning = sizes(work, shards), sum(learnt(work).values())
    batches = budget.accumulate // (hardware.ranks // share)  # that a rank computes one after the other
    moved = (count.passes if parallel.reshard else count.kept) * size.gathered + count.gradients * 4 * learning
    averaged = count.gradients * 4 * learning / shards
    weights, stepping = s.ring_seconds(moved, hardware, shards), 0.0
    weights += s.hop_seconds(2 * averaged * (copies - 1) / copies, hardware, senders=hardware.devices)  # between the groups
    if parallel.cpu_offload:  # shards and gradients share the bus to the host, where the optimizer runs
        weights += s.host_seconds(moved / shards, hardware)
        stepping = count.updates * UPDATE_BYTES * copies * learning / hardware.nodes / (HOST_MEMORY_GBPS * s.GIGA)
    exchanged = 4 * count.forwards * work.activation_bytes * work.model.trunk.num_layers / share
    operations = count.forwards * work.forward_flops * work.batch_size / share
    compute, activations = operations / s.rate(hardware), s.all_to_all_seconds(exchanged, hardware, share)
    found = s.Seconds(compute=batches * compute, weights=batches * weights + stepping, activations=batches * activations)
    return replace(found, first=found.total)


class Passes(NamedTuple):
    """What a step computes for each batch, in forwards of a clip (a backward pass counts as two); how often the weights are gathered,
    when they are freed after use and when they are kept until a backward pass; how often gradients are reduced; the updates of a step."""

    forwards: float
    passes: float
    kept: float
    gradients: float
    updates: int


def _flow_match_passes(work: Training) -> Passes:
    return Passes(3 + work.recipe.speed.recompute, 2, 1, 1, 1)


def _dmd_passes(work: Training) -> Passes:
    """The critic's updates, each with a rollout, and the student's update with a rollout, forwards of teacher and critic, and a replay of
    the rollout with gradients."""
    goal, blocks = work.recipe.objective, work.latent_frames // work.model.rollout.block_frames
    steps, turns, again = goal.sampler.sample_steps, goal.critic_turns, work.recipe.speed.recompute
    guided = 2 if goal.teacher_guide_scale != 1 else 1
    block = work.block.forward_flops / work.forward_flops
    rollout = steps * blocks * block
    critic, student = rollout + 2 + again, rollout + 1 + guided + blocks * block * (2 + again)
    passes = turns * (steps * blocks + 3) + steps * blocks + 1 + 1 + guided + 1 + 2 * blocks
    return Passes(turns * critic + student, passes, turns + blocks, turns + blocks, turns + 1)


def smaller_batches(work: Training) -> Changed:
    """Changes to smaller batches."""
    size = work.batch_size
    for fewer in range(size - 1, 0, -1):
        yield f"{fewer} samples at once instead of {size}", (f"budget.batch_size={fewer}",), work.changed("budget", batch_size=fewer)


def recomputing(work: Training) -> Changed:
    """The change to recompute layers in the backward pass."""
    if not work.recipe.speed.recompute:
        sentence = "layers made again for the gradient instead of remembered"
        yield sentence, ("speed.recompute=true",), work.changed("speed", recompute=True)


def smaller_adapters(work: Training) -> Changed:
    """Changes to adapters of half the rank, a quarter, and so on, down to SMALLEST_RANK."""
    rank = work.learn.rank // 2
    while rank >= SMALLEST_RANK:
        smaller = work.changed("objective", learn=replace(work.learn, rank=rank))
        yield f"adapters of rank {rank} instead of {work.learn.rank}", (f"objective.learn.rank={rank}",), smaller
        rank //= 2


def shorter_samples(work: Training) -> Changed:
    """Changes to fewer latent frames per sample; for DMD a whole number of blocks."""
    window, step = work.recipe.data.window, work.model.rollout.block_frames if work.distils else 1
    for fewer in range(window - step, work.recipe.objective.window.past, -step):
        sentence = f"samples of {fewer} latent frames instead of {window}"
        yield sentence, (f"data.window={fewer}",), work.changed("data", window=fewer)


CHANGES = (smaller_batches, recomputing, smaller_adapters, shorter_samples, smaller_sizes)
