"""The training loop: updates of each role, metrics, checkpoints. The objective and the engine are arguments."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sonic.system.files import save_tensors
from sonic.system.stdio import noted_signal, signals_noted
from sonic.training.engine import Engine
from sonic.training.guard import Guard
from sonic.training.histograms import histograms
from sonic.training.log import RunLog, SampleMaker
from sonic.training.meter import Meter
from sonic.training.objectives.objective import Batch, Losses, Objective, Weighted
from sonic.training.optim import rate
from sonic.training.resume import announce, start_of
from sonic.training.train_config import BudgetConfig, TrainConfig
from sonic.types import upload

NOTICE = "\nsonic: stopping when this step is done and saved; a second signal stops at once\n"
LOG = logging.getLogger(__name__)


class Diverged(ValueError):
    """Raised when the loss or its gradient is not finite or has exploded. The last good checkpoint and the batch are kept."""


@dataclass(frozen=True)
class TrainingResult:
    """Totals of a run; `new_steps` are those since it was last resumed, `figures` are means over the last steps.

    `signal` is the number of the signal that stopped it, 0 when its budget was used.
    """

    steps: int
    new_steps: int
    seconds: float
    samples: int
    figures: dict[str, float]
    signal: int = 0


def used_share(budget: BudgetConfig, step: int, seconds: float) -> float:
    """Share of the budget used before `step`, after so many seconds; 1.0 = done."""
    return min(1.0, step / budget.max_steps if budget.max_steps else seconds / (60 * budget.max_minutes))


def step_rng(seed: int, step: int, *, part: int, device: torch.device) -> torch.Generator:
    """Random generator of one loss: depends on the run's seed, the step and the part alone, so that a restart needs no state."""
    words = np.random.SeedSequence((seed, step, part)).generate_state(2, np.uint32)
    number = int(words[0]) << 31 | int(words[1]) >> 1
    torch.manual_seed(number ^ 1)  # for operations without a generator argument, such as dropout
    return torch.Generator(device).manual_seed(number)


@dataclass(frozen=True)
class TrainingRun:
    """The parts of a training run, and its folder.

    `batches(start)` opens this process's stream of batches after `start` batches have been used by all processes together;
    `make_sample(step)` generates and scores a sample video of the student; `validate()` gives its figures on held-out clips.
    """

    config: TrainConfig
    objective: Objective
    engine: Engine
    batches: Callable[[int], Iterator[Batch]]
    log: RunLog
    folder: Path
    make_sample: SampleMaker | None = None
    commit: str = "unknown"
    validate: Callable[[], dict[str, float]] | None = None
    guard: Guard = field(default_factory=Guard)


def train(run: TrainingRun) -> TrainingResult:
    """Train until the budget is used or any process gets a signal, continuing from a checkpoint in the run folder if there is one.

    A signal ends the training after the step under way, which is saved; a second one raises KeyboardInterrupt. A step updates each role
    of `objective.roles_in_step`, usually the student once; an update uses `budget.accumulate` batches. Raises Diverged when a loss or
    gradient is not finite, or a loss explodes.
    """
    config, objective, engine, log, world = run.config, run.objective, run.engine, run.log, run.engine.world
    engine.prepare(objective)
    checkpoint = engine.load()  # its metadata; {} at the start
    start = start_of(config, commit=run.commit, ranks=world.ranks)
    announce(checkpoint, start, run.folder, budget=_amount(config.budget))
    first = step = checkpoint.get("step", 0)
    used = checkpoint.get("batches", 0)
    figures = checkpoint.get("figures", {})  # of the last log line
    meter = Meter(checkpoint.get("meter", {}), samples=config.budget.batch_size * config.budget.accumulate, device=world.device)
    saved = time.monotonic()
    began = saved - checkpoint.get("seconds", 0.0)  # as if the training had never been interrupted
    stream = meter.batches(run.batches(used))
    progress = world.from_first_rank(used_share(config.budget, step, time.monotonic() - began))
    stop = 0
    with signals_noted(NOTICE if world.main else ""), log.open(step, progress):
        while progress < 1 and not stop:
            lr = rate(step, progress, config.optim)
            for number, role in enumerate(objective.roles_in_step(step)):
                with meter.update(role):
                    meter.add(_update(run, role, stream, step=step, number=number, lr=lr * objective.rates.get(role, 1.0)))
                used += config.budget.accumulate
            step, meter.steps = step + 1, meter.steps + 1
            progress = world.from_first_rank(used_share(config.budget, step, time.monotonic() - began))
            last = progress >= 1
            if last or step == 1 or step % config.log.every_steps == 0:
                figures = {**meter.line(), "train/lr": lr}
                sample = run.make_sample(step) if run.make_sample and (last or step % config.log.samples_every == 0) else None
                checked = run.validate() if run.validate and (last or step % config.log.validation_every == 0) else {}
                log.scalars(step, {**figures, **checked, **(sample.figures if sample else {})}, sample and sample.video)
                log.tick(step, progress, figures)
                meter.restart()
            stop = world.largest(noted_signal())
            if last or stop or world.largest(_checkpoint_due(config, step, saved)):
                totals = {**start, "seconds": time.monotonic() - began, "seed": config.seed, "figures": figures, "meter": dict(meter.sums)}
                engine.save(step, {"batches": used, **totals})
                saved = time.monotonic()
        engine.checkpoints.settle()
        stop = world.largest(noted_signal())
    if stop:
        LOG.info("saved step %d; the same command continues", engine.checkpoints.newest)
    seconds, samples = time.monotonic() - began, used * config.budget.batch_size
    return TrainingResult(step, step - first, seconds=seconds, samples=samples, figures=figures, signal=stop)


def _amount(budget: BudgetConfig) -> str:
    """A budget in words."""
    return f"{budget.max_steps} steps" if budget.max_steps else f"{budget.max_minutes:g} minutes"


def _checkpoint_due(config: TrainConfig, step: int, saved: float) -> bool:
    """Whether `step` is to be saved, after the last checkpoint was at the time `saved`."""
    by_steps = config.checkpoint.every_steps and step % config.checkpoint.every_steps == 0
    return bool(by_steps) or time.monotonic() - saved > 60 * config.checkpoint.every_minutes


def _update(run: TrainingRun, role: str, stream: Iterator[Batch], *, step: int, number: int, lr: float) -> dict[str, tuple[float, float]]:
    """Losses, gradients and the optimizer step of update `number` of a step. Returns total and weight of its metrics, averaged over all
    processes; a weight is 1 where all samples count.

    The batches of an update are numbered over all processes together and a batch's random generator depends on its number, so that
    the number of processes changes only the order of sums. Processes that share a batch's tokens compute the same metrics.
    """
    config, world = run.config, run.engine.world
    ranks, rank = world.data_ranks, world.data_rank
    count = config.budget.accumulate // ranks
    figures: list[dict[str, tuple[Tensor, ...]]] = []
    used: list[Batch] = []  # in host memory
    for index in range(count):
        used.append(next(stream))
        batch = {name: upload(v, world.device) if isinstance(v, Tensor) else v for name, v in used[-1].items()}
        part = number * config.budget.accumulate + index * ranks + rank
        rng = step_rng(config.seed, step, part=part, device=world.device)
        figures.append(_backpropagate(run, role, run.objective.losses(role, batch, rng), share=1 / count))
    if world.main and config.log.histograms_every and (step + 1) % config.log.histograms_every == 0:
        run.log.histograms(step + 1, histograms(role, run.engine.roles[role]))
    norm = run.engine.step(role, rate=lr, step=step)
    means = torch.stack([torch.stack([part.float() for parts in values.values() for part in parts]) for values in figures]).mean(0)
    means = torch.cat((means, norm.view(1).to(means))).cpu()  # the only time that the host waits for the device
    norm, found = float(means[-1]), iter(world.mean(means[:-1]).tolist())
    metrics = {_curve(role, name): (next(found), next(found) if len(parts) == 2 else 1.0) for name, parts in figures[0].items()}
    loss, _ = metrics[f"{role}/loss"]
    if fault := run.guard.fault(role, loss, norm):
        _save_worst_batch(run, used, [float(values["loss"][0]) for values in figures])
        run.engine.checkpoints.settle()
        raise Diverged(
            f"step {step}: loss {loss:.4g} with gradient norm {norm:.4g} {fault}; the last good checkpoint "
            f"and the batch are kept in {run.folder}; try a smaller optim.lr={config.optim.lr}"
        )
    return {**metrics, f"{role}/grad_norm": (norm, 1.0)}


def _curve(role: str, name: str) -> str:
    """Name in the log of a figure of an update: under the role that learns, unless the objective names another, as in "teacher/score"."""
    return name if "/" in name else f"{role}/{name}"


def _save_worst_batch(run: TrainingRun, batches: Sequence[Batch], losses: Sequence[float]) -> None:
    """Write the batch of this process whose loss is not finite, or else the largest."""
    sizes = [abs(loss) if math.isfinite(loss) else math.inf for loss in losses]
    batch, rank = batches[sizes.index(max(sizes))], run.engine.world.rank
    tensors = {name: v.cpu().contiguous() for name, v in batch.items() if isinstance(v, Tensor)}
    save_tensors(tensors, run.folder / f"diverged_batch{f'_{rank}' if rank else ''}.safetensors")


def _backpropagate(run: TrainingRun, role: str, losses: Losses, *, share: float) -> dict[str, tuple[Tensor, ...]]:
    """Backpropagate every part of a loss before the next part is computed. Returns the loss and its metrics, with the weights some have."""
    total, figures = 0.0, {}
    while True:
        with run.engine.precision():
            part = next(losses, None)
        if part is None:
            return {"loss": (total,), **figures}
        loss, values = part
        run.engine.backward(role, loss * share)
        parts = {name: value if isinstance(value, Weighted) else (value,) for name, value in values.items()}
        total, figures = total + loss.detach(), {name: tuple(part.detach() for part in both) for name, both in parts.items()}
