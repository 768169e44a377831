"""The training loop: updates of each role, metrics, checkpoints. The objective and the engine are arguments."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sonic.evaluation.metrics import peak_rss_gib
from sonic.system.files import save_tensors
from sonic.training.engine import Engine
from sonic.training.guard import Guard
from sonic.training.log import RunLog, SampleMaker
from sonic.training.objectives import Batch, Losses, Objective
from sonic.training.optim import rate
from sonic.training.train_config import TrainConfig
from sonic.training.world import batch_share


class Diverged(ValueError):
    """Raised when the loss or its gradient is not finite or has exploded. The last good checkpoint and the batch are kept."""


@dataclass(frozen=True)
class TrainingResult:
    """Totals of a run; `made` is the number of steps made by this process, `figures` are means over the last steps."""

    steps: int
    made: int
    seconds: float
    samples: int
    figures: dict[str, float]


class Meter:
    """Running sums of metrics between two log lines, kept as tensors until read. `kept` is the `state()` of an earlier meter."""

    def __init__(self, kept: Mapping[str, tuple[float, int]] | None = None, *, device: torch.device) -> None:
        self._sums = {name: torch.tensor(total, dtype=torch.float32, device=device) for name, (total, _) in (kept or {}).items()}
        self._counts = {name: count for name, (_, count) in (kept or {}).items()}

    def add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def state(self) -> dict[str, tuple[float, int]]:
        """Exact sums and counts, so that a resumed run logs the same values as an uninterrupted one."""
        return {name: (float(total), self._counts[name]) for name, total in self._sums.items()}

    def read(self) -> dict[str, float]:
        """Means since the last `read`."""
        means = {name: float(total) / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return means


class TrainingClock:
    """Elapsed seconds of a run, including those before a restart, and the share of the budget that is used."""

    def __init__(self, config: TrainConfig, before: float) -> None:
        self.budget, self.before, self.start = config.budget, before, time.monotonic()

    def seconds(self) -> float:
        return self.before + time.monotonic() - self.start

    def progress(self, step: int) -> float:
        """Share of the budget used before `step`; 1.0 = done."""
        if self.budget.max_steps:
            return min(1.0, step / self.budget.max_steps)
        return min(1.0, self.seconds() / (60 * self.budget.max_minutes))

    def left(self, step: int, first: int) -> float:
        """Estimated seconds to the end of the budget (`first` = step at which this process started)."""
        if self.budget.max_minutes:
            return max(0.0, 60 * self.budget.max_minutes - self.seconds())
        return (self.budget.max_steps - step) * (time.monotonic() - self.start) / max(1, step - first)


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
    `look(step)` makes a sample video of the student.
    """

    config: TrainConfig
    objective: Objective
    engine: Engine
    batches: Callable[[int], Iterator[Batch]]
    log: RunLog
    folder: Path
    look: SampleMaker | None = None
    guard: Guard = field(default_factory=Guard)


def train(run: TrainingRun) -> TrainingResult:
    """Train until the budget is used, continuing from the newest checkpoint in the run folder if there is one.

    Raises Diverged when a loss or gradient is not finite, or a loss explodes.
    """
    config, objective, engine, log = run.config, run.objective, run.engine, run.log
    engine.prepare(objective)
    metadata = engine.load()
    first = step = int(metadata.get("step", 0))
    clock = TrainingClock(config, float(metadata.get("seconds", 0.0)))
    used = int(metadata.get("batches", 0))
    stream = run.batches(used)
    meter, figures, kept_at = Meter(metadata.get("meter"), device=engine.world.device), dict(metadata.get("figures", {})), time.monotonic()
    with log.open(step, config.budget.max_steps or None):
        progress = engine.world.from_first_rank(clock.progress(step))
        while progress < 1:
            lr = rate(step, progress, config.optim)
            for number, role in enumerate(objective.turn(step)):
                turn = Turn(role, step, number)
                meter.add(_update(run, turn, stream, lr=lr * objective.rates.get(role, 1.0)))
                used += config.budget.accumulate
            step += 1
            progress = engine.world.from_first_rank(clock.progress(step))
            last = progress >= 1
            if last or step % config.log.every_steps == 0:
                figures = meter.read()
                pace = (step - first) / (time.monotonic() - clock.start)
                samples = pace * config.budget.batch_size * config.budget.accumulate
                figures |= {"perf/samples_per_second": samples, "perf/seconds_per_step": 1 / pace}
                figures |= {"perf/peak_gib": peak_gib(engine.world.device), "train/lr": lr}
                sample = run.look(step) if run.look and (last or step % config.log.samples_every == 0) else None
                log.scalars(step, {**figures, **(sample.figures if sample else {})}, sample and sample.video)
                loss = figures.get("train/student_loss", float("nan"))
                log.tick(step, loss, samples_per_second=samples, seconds_left=clock.left(step, first))
            if last or engine.world.from_first_rank(_due(config, step, kept_at)):
                totals = {"seconds": clock.seconds(), "seed": config.seed, "figures": figures, "meter": meter.state()}
                engine.save(step, {"batches": used, **totals})
                kept_at = time.monotonic()
    engine.settle()
    return TrainingResult(step, step - first, seconds=clock.seconds(), samples=used * config.budget.batch_size, figures=figures)


def peak_gib(device: torch.device) -> float:
    """Peak memory in GiB: of the GPU, or of this process when training on the CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else peak_rss_gib()


def _due(config: TrainConfig, step: int, kept_at: float) -> bool:
    by_steps = config.checkpoint.every_steps and step % config.checkpoint.every_steps == 0
    return bool(by_steps) or time.monotonic() - kept_at > 60 * config.checkpoint.every_minutes


class Turn(NamedTuple):
    """One update of a role: its step, and its number within the step."""

    role: str
    step: int
    number: int


def _update(run: TrainingRun, turn: Turn, stream: Iterator[Batch], *, lr: float) -> dict[str, Tensor]:
    """Losses, gradients and one optimizer step of a role. Returns its metrics, averaged over all processes.

    The batches of an update are numbered over all processes together and a batch's random generator depends on its number, so that
    the number of processes changes only the order of sums. Processes that share a batch's tokens compute the same metrics.
    """
    (role, step, _), config, world = turn, run.config, run.engine.world
    share = batch_share(world)
    count = config.budget.accumulate // share.count
    figures: list[dict[str, Tensor]] = []
    used: list[Batch] = []  # in host memory
    for index in range(count):
        used.append(next(stream))
        batch = {name: v.to(world.device, non_blocking=True) if isinstance(v, Tensor) else v for name, v in used[-1].items()}
        part = turn.number * config.budget.accumulate + index * share.count + share.index
        rng = step_rng(config.seed, step, part=part, device=world.device)
        figures.append(_descend(run, role, run.objective.losses(role, batch, rng), share=1 / count))
    norm = run.engine.step(role, rate=lr, step=step)
    names = list(figures[0])
    means = world.mean(torch.stack([torch.stack([values[name].float() for name in names]) for values in figures]).mean(0))
    metrics = {f"train/{name}": value for name, value in zip(names, means, strict=True)}
    total = metrics[f"train/{role}_loss"]
    fault = run.guard.fault(role, float(total), float(norm))
    if fault:
        _keep_worst(run, used, [float(values[f"{role}_loss"]) for values in figures])
        run.engine.settle()
        raise Diverged(
            f"step {step}: loss {float(total):.4g} with gradient norm {float(norm):.4g} {fault}; the last good checkpoint "
            f"and the batch are kept in {run.folder}; try a smaller optim.lr={config.optim.lr}"
        )
    return {**metrics, f"train/{role}_grad_norm": norm.detach()}


def _keep_worst(run: TrainingRun, batches: Sequence[Batch], losses: Sequence[float]) -> None:
    """Write the batch of this process whose loss is not finite, or else the largest."""
    sizes = [abs(loss) if math.isfinite(loss) else math.inf for loss in losses]
    batch, rank = batches[sizes.index(max(sizes))], run.engine.world.rank
    tensors = {name: v.cpu().contiguous() for name, v in batch.items() if isinstance(v, Tensor)}
    save_tensors(tensors, run.folder / f"diverged_batch{f'_{rank}' if rank else ''}.safetensors")


def _descend(run: TrainingRun, role: str, losses: Losses, *, share: float) -> dict[str, Tensor]:
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
