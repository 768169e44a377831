"""Plans of a training: which of its variants fit on given hardware, how long a step takes at least, what would make it fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from sonic.config import PHOTO_SIZE
from sonic.model.counts import block_multiply_adds, forward_multiply_adds
from sonic.parallel.parallel_config import HardwareConfig, ParallelConfig, PlanConfig
from sonic.planner import step_time as s
from sonic.planner.memory import GIB, HOST_GIB
from sonic.planner.search import EQUAL, Change, Changed, Planned, answer_json, smaller_sizes
from sonic.planner.training_memory import host_bytes, moments, sizes
from sonic.planner.training_workload import Training, training
from sonic.system.program import written

SMALLEST_RANK = 8
UPDATE_BYTES = 28  # that AdamW reads and writes for a number
HOST_MEMORY_GBPS = 40  # of the host, all ranks together


@dataclass(frozen=True)
class TrainingPlan:
    """One way to run a training: bytes of every rank by moment and item, bytes of host memory of each, time of a step."""

    name: str
    parallel: ParallelConfig
    ranks: int
    moments: Mapping[str, Mapping[str, float]]
    host: float
    seconds: s.Seconds
    frames: int

    @property
    def fullest(self) -> str:
        """The moment that needs most."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def items(self) -> Mapping[str, float]:
        """What it needs then."""
        return self.moments[self.fullest]

    @property
    def peak_gib(self) -> float:
        """Of every rank."""
        return sum(self.items.values()) / GIB

    @property
    def knobs(self) -> tuple[str, ...]:
        """What to tell the command train."""
        found = ["speed.engine=fsdp"]
        found += [f"speed.context={self.parallel.context}"] * (self.parallel.context > 1)
        return (*found, *["speed.cpu_offload=true"] * self.parallel.cpu_offload)

    def missing_gib(self, hardware: HardwareConfig) -> float:
        """What a rank, or host memory, lacks; 0 when the plan fits."""
        return max(0.0, self.peak_gib - hardware.usable_gib, self.host * self.ranks / GIB - hardware.host_gib)


PlannedTraining = Planned[Training, TrainingPlan]


def planned_training(config: PlanConfig) -> PlannedTraining:
    """Plans for a training. Raises ValueError when what is asked for by name makes no sense on this hardware."""
    found = Planned(training(config), config.hardware, _ranked(config), notes=tuple(_notes(config)))
    return found if found.fits else replace(found, changes=tuple(_changes(config)))


def training_plan(work: Training, hardware: HardwareConfig, parallel: ParallelConfig, *, steps: int) -> TrainingPlan:
    """FSDP2 over all ranks, `parallel.context` of which share the tokens of a batch."""
    name = f"fsdp{'+context' if parallel.context > 1 else ''}{'+cpu_offload' if parallel.cpu_offload else ''}"
    host = HOST_GIB * GIB + (host_bytes(work, hardware.devices) if parallel.cpu_offload else 0)
    seconds = _seconds(work, hardware, parallel, steps=steps)
    return TrainingPlan(name, parallel, hardware.devices, moments(work, hardware, parallel), host, seconds, work.frames)


def untracked_training(plan: TrainingPlan) -> str:
    """The sentence for a plan that cannot be tracked on fake tensors; empty for others."""
    return f"{plan.name} is predicted only: a fake rank's device and host memory are one" if plan.parallel.cpu_offload else ""


def training_json(found: PlannedTraining, tracked: Mapping[str, float] | None = None, *, untracked: str = "") -> dict:
    """The answer for programs, in the words of a film's plans; a "block" is a step. `tracked` = GiB by moment on fake tensors,
    `untracked` = why these are not known although they were asked for."""
    plans = [_plan_json(plan, found.hardware) for plan in found.plans]
    if tracked is not None:
        plans[0]["tracked_gib_per_rank"] = [round(max(tracked.values()), 3)] * found.chosen.ranks
        plans[0]["tracked_moments_gib"] = {moment: round(value, 3) for moment, value in tracked.items()}
    return answer_json(found, plans, _plan_json, untracked=untracked)


def training_reason(plan: TrainingPlan, hardware: HardwareConfig) -> str:
    """Why a plan fits or not, and what it is bound by."""
    host = plan.host * plan.ranks / GIB
    if plan.peak_gib > hardware.usable_gib:
        largest = max(plan.items, key=plan.items.__getitem__)
        lacks = (
            f"{plan.peak_gib - hardware.usable_gib:.1f} GiB too much for a device of {hardware.usable_gib:g} in its {plan.fullest} moment"
        )
        return f"{lacks}; the largest part is {largest.replace('_', ' ')}, {plan.items[largest] / GIB:.1f} GiB"
    if host > hardware.host_gib:
        return f"{host - hardware.host_gib:.1f} GiB too much for {hardware.host_gib:g} GiB of host memory"
    bound = "arithmetic" if plan.seconds.compute >= plan.seconds.weights + plan.seconds.activations else "copying"
    return f"fits with {hardware.usable_gib - plan.peak_gib:.1f} GiB to spare, fullest in its {plan.fullest} moment, bound by {bound}"


def _plan_json(plan: TrainingPlan, hardware: HardwareConfig) -> dict:
    total = plan.seconds.total
    return {
        "plan": plan.name,
        "fits": plan.missing_gib(hardware) == 0,
        "peak_gib_per_rank": [round(plan.peak_gib, 3)] * plan.ranks,
        "items_gib": {name: round(size / GIB, 3) for name, size in plan.items.items()},
        "moments_gib": {moment: round(sum(items.values()) / GIB, 3) for moment, items in plan.moments.items()},
        "host_gib_per_rank": round(plan.host / GIB, 2),
        "seconds_per_block": round(total, 4),
        "seconds_per_step": round(total, 4),
        "frames_per_second": round(plan.frames / total, 3),
        "first_frame_s": round(total, 3),
        "reason": training_reason(plan, hardware),
        "knobs": list(plan.knobs),
    }


def _ranked(config: PlanConfig) -> tuple[TrainingPlan, ...]:
    """A plan for each variant: those that fit first, then the fastest, of equally fast ones the simplest."""
    work, hardware = training(config), config.hardware
    plans = [training_plan(work, hardware, each, steps=config.sampler.sample_steps) for each in _variants(config, work)]
    fitting = [plan.seconds.total for plan in plans if not plan.missing_gib(hardware)]
    enough = EQUAL * min(fitting or [plan.seconds.total for plan in plans])

    def order(plan: TrainingPlan) -> tuple:
        return plan.missing_gib(hardware), max(plan.seconds.total, enough), plan.parallel.cpu_offload, plan.parallel.context

    return tuple(sorted(plans, key=order))


def _variants(config: PlanConfig, work: Training) -> Iterator[ParallelConfig]:
    """What was asked for, or for auto everything that makes sense: tokens shared by more ranks, shards on the host."""
    asked, devices = config.parallel, config.hardware.devices
    if asked.name not in ("auto", "fsdp"):
        raise ValueError(f"parallel={asked.name}: trainings are planned for fsdp alone; leave it out, or use parallel=fsdp")
    if asked.name == "fsdp":
        share = devices if asked.context == -1 else asked.context
        sentence = _why_not(work, devices, share)
        if sentence:
            raise ValueError(f"parallel.context={share}: {sentence}")
        yield replace(asked, context=share)
        return
    for share, offload in product((1, 2, 4, 8), (False, True)):
        if not _why_not(work, devices, share):
            yield replace(asked, name="fsdp", context=share, cpu_offload=offload)


def _why_not(work: Training, devices: int, share: int) -> str:
    """The sentence for a sharing of tokens that makes no sense here; empty when it does."""
    heads, (rows, columns) = work.model.trunk.num_heads, work.grid
    if devices % share or heads % share or rows * columns % share:
        return f"{share} ranks cannot share {heads} heads and {rows * columns} tokens of a frame evenly on {devices} devices"
    readers = devices // share
    if work.task.accumulate % readers:
        return f"task.accumulate={work.task.accumulate} batches cannot be shared by {readers} rows of ranks"
    return ""


def _seconds(work: Training, hardware: HardwareConfig, parallel: ParallelConfig, *, steps: int) -> s.Seconds:
    """A step: forwards, layers made again, gradients; against what every pass over the weights gathers."""
    forwards, passes, gradients = PASSES[work.task.objective](work, steps)
    share, ranks = parallel.context, hardware.devices
    batches = work.task.accumulate // (ranks // share)  # one after the other on a rank
    size = sizes(work, ranks)
    model = size.root + sum(numbers for _, numbers in size.units)
    moved = passes * model + gradients * 4 * sum(size.learnt.values())
    weights = s.link_seconds(moved * (ranks - 1) / ranks, hardware)
    updates = work.task.critic_turns + 1 if work.task.objective == "dmd" else 1
    stepping = 0.0
    if parallel.cpu_offload:  # shards come up and gradients go down the same bus; the optimizer runs on the host
        weights += s.host_seconds((passes * model + 4 * gradients * sum(size.learnt.values())) / ranks, hardware)
        stepping = updates * UPDATE_BYTES * sum(size.learnt.values()) / (HOST_MEMORY_GBPS * s.GIGA)
    exchanged = 4 * forwards * work.clip * work.row * work.model.trunk.num_layers / share * (share - 1) / share
    operations = 2 * forwards * _forward(work) * work.task.batch_size / share
    compute, activations = operations / s.rate(hardware), s.link_seconds(exchanged, hardware)
    return s.Seconds(compute=batches * compute, weights=batches * weights + stepping, activations=batches * activations)


def _flow_match_passes(work: Training, steps: int) -> tuple[float, float, float]:
    """(forwards of a clip, passes over the weights, gradients) of a batch: forward, again, and a gradient of weights and inputs."""
    again = 1 if work.task.recompute else 0
    return 3 + again, 2, 1


def _dmd_passes(work: Training, steps: int) -> tuple[float, float, float]:
    """The same of a critic's turns, each with a rollout, and a student's with one, teacher and critic, and its replay."""
    task, blocks = work.task, work.blocks
    again, guided = 1 if task.recompute else 0, 2 if task.teacher_guide_scale != 1 else 1
    block = block_multiply_adds(work.model, work.grid, blocks=work.model.rollout.window_blocks) / _forward(work)
    rollout = steps * blocks * block
    critic, student = rollout + 2 + again, rollout + 1 + guided + blocks * block * (2 + again)
    passes = task.critic_turns * (steps * blocks + 3) + steps * blocks + 1 + 1 + guided + 1 + 2 * blocks
    return task.critic_turns * critic + student, passes, task.critic_turns + blocks


PASSES: Mapping[str, Callable[[Training, int], tuple[float, float, float]]] = {"dmd": _dmd_passes, "flow_match": _flow_match_passes}


def _forward(work: Training) -> int:
    """Multiply-adds of a sample seen as a clip."""
    return forward_multiply_adds(work.model, work.latent_frames, work.grid, motion=bool(work.task.past))


def _changes(config: PlanConfig) -> Iterator[Change[TrainingPlan]]:
    """The smallest change of each kind that makes it fit, each found by planning it."""
    for kind in (_other_plans, _smaller_batches, _recomputing, _smaller_adapters, _shorter_windows, _smaller_sizes):
        for sentence, knobs, changed in kind(config):
            best = _ranked(changed)[0]
            if best.missing_gib(config.hardware) == 0:
                yield Change(sentence, knobs, best)
                break


def _other_plans(config: PlanConfig) -> Changed:
    if config.parallel.name != "auto":
        changed = replace(config, parallel=replace(config.parallel, name="auto", context=1, cpu_offload=False))
        best = _ranked(changed)[0]
        yield f"another plan: {best.name}", ("parallel=auto",), changed


def _smaller_batches(config: PlanConfig) -> Changed:
    task = config.task
    for fewer in range(task.batch_size - 1, 0, -1):
        changed = replace(config, task=replace(task, batch_size=fewer))
        yield f"{fewer} samples at once instead of {task.batch_size}", (f"task.batch_size={fewer}",), changed


def _recomputing(config: PlanConfig) -> Changed:
    if not config.task.recompute:
        changed = replace(config, task=replace(config.task, recompute=True))
        yield "layers made again for the gradient instead of remembered", ("task.recompute=true",), changed


def _smaller_adapters(config: PlanConfig) -> Changed:
    learn = config.task.learn
    rank = learn.rank // 2
    while rank >= SMALLEST_RANK:
        changed = replace(config, task=replace(config.task, learn=replace(learn, rank=rank)))
        yield f"adapters of rank {rank} instead of {learn.rank}", (f"task.learn.rank={rank}",), changed
        rank //= 2


def _shorter_windows(config: PlanConfig) -> Changed:
    task, step = config.task, config.model.rollout.block_frames if config.task.objective == "dmd" else 1
    for fewer in range(task.window - step, task.past, -step):
        changed = replace(config, task=replace(task, window=fewer))
        yield f"samples of {fewer} latent frames instead of {task.window}", (f"task.window={fewer}",), changed


def _smaller_sizes(config: PlanConfig) -> Changed:
    work = training(config)
    return smaller_sizes(config, work.width, work.height)


def _notes(config: PlanConfig) -> Sequence[str]:
    """What the plan took for granted."""
    task = config.task
    learns = f"adapters of rank {task.learn.rank}" if task.learn.rank else "weights themselves"
    said = [f"a 'block' below is a step of {task.accumulate} batches of {task.batch_size}; {learns} learn, in {task.precision}"]
    if not config.model.resolution and config.video.size == PHOTO_SIZE:
        said.append(
            "video.size=photo: a training has no photograph, so the usual 704x384 is planned; video.size=WIDTHxHEIGHT plans another"
        )
    return [*said, f"latents, text rows and speech features are made beforehand ({written('precompute')}), so that no encoder is here"]
