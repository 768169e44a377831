"""The training loop: updates of each role, metrics, checkpoints. The objective and the engine are arguments."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sonic.evaluation.metrics import peak_rss_gib
from sonic.system.files import save_tensors
from sonic.training.engine import Engine
from sonic.training.guard import Guard
from sonic.training.log import RunLog, SampleMaker
from sonic.training.objectives.objective import Batch, Losses, Objective
from sonic.training.optim import rate
from sonic.training.train_config import BudgetConfig, TrainConfig
from sonic.types import upload


class Diverged(ValueError):
    """Raised when the loss or its gradient is not finite or has exploded. The last good checkpoint and the batch are kept."""


@dataclass(frozen=True)
class TrainingResult:
    """Totals of a run; `new_steps` are those since it was last resumed, `figures` are means over the last steps."""

    steps: int
    new_steps: int
    seconds: float
    samples: int
    figures: dict[str, float]


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
    validate: Callable[[], dict[str, float]] | None = None
    guard: Guard = field(default_factory=Guard)


def train(run: TrainingRun) -> TrainingResult:
    """Train until the budget is used, continuing from the newest checkpoint in the run folder if there is one.

    A step updates each role of `objective.roles_in_step`, usually the student once; an update uses `budget.accumulate` batches. Raises
    Diverged when a loss or gradient is not finite, or a loss explodes.
    """
    config, objective, engine, log, world = run.config, run.objective, run.engine, run.log, run.engine.world
    engine.prepare(objective)
    checkpoint = engine.load()  # its metadata; {} at the start
    first = step = checkpoint.get("step", 0)
    used = checkpoint.get("batches", 0)
    figures, sums = checkpoint.get("figures", {}), checkpoint.get("meter", {})  # of the last log line; since then (sum, count) by name
    resumed = saved = time.monotonic()
    began = resumed - checkpoint.get("seconds", 0.0)  # as if the training had never been interrupted
    stream = run.batches(used)
    progress = world.from_first_rank(used_share(config.budget, step, time.monotonic() - began))
    with log.open(step, progress):
        while progress < 1:
            lr = rate(step, progress, config.optim)
            for number, role in enumerate(objective.roles_in_step(step)):
                values = _update(run, role, stream, step=step, number=number, lr=lr * objective.rates.get(role, 1.0))
                for name, value in values.items():
                    total, count = sums.get(name, (0.0, 0))
                    sums[name] = total + value, count + 1
                used += config.budget.accumulate
            step += 1
            progress = world.from_first_rank(used_share(config.budget, step, time.monotonic() - began))
            last = progress >= 1
            if last or step == 1 or step % config.log.every_steps == 0:
                figures, sums = {name: total / count for name, (total, count) in sums.items()}, {}
                pace = (step - first) / (time.monotonic() - resumed)
                samples = pace * config.budget.batch_size * config.budget.accumulate
                figures |= {"perf/samples_per_second": samples, "perf/seconds_per_step": 1 / pace}
                figures |= {"perf/peak_gib": peak_gib(world.device), "train/lr": lr}
                sample = run.make_sample(step) if run.make_sample and (last or step % config.log.samples_every == 0) else None
                checked = run.validate() if run.validate and (last or step % config.log.validation_every == 0) else {}
                log.scalars(step, {**figures, **checked, **(sample.figures if sample else {})}, sample and sample.video)
                log.tick(step, progress, f"loss {figures.get('train/student_loss', math.nan):.4f}, {samples:.1f} samples/s")
            if last or world.from_first_rank(_checkpoint_due(config, step, saved)):
                totals = {"seconds": time.monotonic() - began, "seed": config.seed, "figures": figures, "meter": dict(sums)}
                engine.save(step, {"batches": used, **totals})
                saved = time.monotonic()
    engine.checkpoints.settle()
    return TrainingResult(step, step - first, seconds=time.monotonic() - began, samples=used * config.budget.batch_size, figures=figures)


def peak_gib(device: torch.device) -> float:
    """Peak memory in GiB: of the GPU, or of this process when training on the CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else peak_rss_gib()


def _checkpoint_due(config: TrainConfig, step: int, saved: float) -> bool:
    """Whether `step` is to be saved, after the last checkpoint was at the time `saved`."""
    by_steps = config.checkpoint.every_steps and step % config.checkpoint.every_steps == 0
    return bool(by_steps) or time.monotonic() - saved > 60 * config.checkpoint.every_minutes


def _update(run: TrainingRun, role: str, stream: Iterator[Batch], *, step: int, number: int, lr: float) -> dict[str, float]:
    """Losses, gradients and the optimizer step of update `number` of a step. Returns its metrics, averaged over the batches of all
    processes that have them; a metric of which there is none, not a number in every batch, is left out.

    The batches of an update are numbered over all processes together and a batch's random generator depends on its number, so that
    the number of processes changes only the order of sums. Processes that share a batch's tokens compute the same metrics.
    """
    config, world = run.config, run.engine.world
    ranks, rank = world.size("layers"), world.coordinate("layers")  # of those that have batches of their own
    count = config.budget.accumulate // ranks
    figures: list[dict[str, Tensor]] = []
    used: list[Batch] = []  # in host memory
    for index in range(count):
        used.append(next(stream))
        batch = {name: upload(v, world.device) if isinstance(v, Tensor) else v for name, v in used[-1].items()}
        part = number * config.budget.accumulate + index * ranks + rank
        rng = step_rng(config.seed, step, part=part, device=world.device)
        figures.append(_backpropagate(run, role, run.objective.losses(role, batch, rng), share=1 / count))
    norm = run.engine.step(role, rate=lr, step=step)
    found = torch.stack([torch.stack([value.float() for value in values.values()]) for values in figures])
    known = ~found.isnan()
    known[:, 0] = True  # the loss, of which the guard must see that it is not a number
    totals = torch.cat((found.where(known, 0).sum(0), known.sum(0), norm.view(1).to(found))).cpu()  # the only time that the host waits
    norm, (sums, counts) = float(totals[-1]), world.mean(totals[:-1]).view(2, -1)
    metrics = {f"train/{name}": value for name, value in zip(figures[0], (sums / counts).tolist(), strict=True)}
    metrics = {name: value for (name, value), count in zip(metrics.items(), counts.tolist(), strict=True) if count}
    loss = metrics[f"train/{role}_loss"]
    if fault := run.guard.fault(role, loss, norm):
        _save_worst_batch(run, used, [float(values[f"{role}_loss"]) for values in figures])
        run.engine.checkpoints.settle()
        raise Diverged(
            f"step {step}: loss {loss:.4g} with gradient norm {norm:.4g} {fault}; the last good checkpoint "
            f"and the batch are kept in {run.folder}; try a smaller optim.lr={config.optim.lr}"
        )
    return {**metrics, f"train/{role}_grad_norm": norm}


def _save_worst_batch(run: TrainingRun, batches: Sequence[Batch], losses: Sequence[float]) -> None:
    """Write the batch of this process whose loss is not finite, or else the largest."""
    sizes = [abs(loss) if math.isfinite(loss) else math.inf for loss in losses]
    batch, rank = batches[sizes.index(max(sizes))], run.engine.world.rank
    tensors = {name: v.cpu().contiguous() for name, v in batch.items() if isinstance(v, Tensor)}
    save_tensors(tensors, run.folder / f"diverged_batch{f'_{rank}' if rank else ''}.safetensors")


def _backpropagate(run: TrainingRun, role: str, losses: Losses, *, share: float) -> dict[str, Tensor]:
    """Backpropagate every part of a loss before the next part is computed. Returns the loss and its metrics."""
    total, figures = 0.0, {}
    while True:
        with run.engine.precision():
            part = next(losses, None)
        if part is None:
            return {f"{role}_loss": total, **figures}
        loss, values = part
        run.engine.backward(role, loss * share)
        total, figures = total + loss.detach(), {name: value.detach() for name, value in values.items()}
