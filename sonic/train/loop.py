"""The training loop: turns, losses, steps, figures, checkpoints. What is learnt and where it runs are arguments."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from sonic.train import checkpoint
from sonic.train.engine import Engine
from sonic.train.log import RunLog
from sonic.train.objectives import Batch, Objective
from sonic.train.optim import rate
from sonic.train.settings import TrainConfig


class Diverged(ValueError):
    """The loss or its gradient stopped being a finite number. The last good checkpoint and the batch are kept."""


@dataclass(frozen=True)
class Outcome:
    """What a run used and reached; `figures` are means over the last steps."""

    steps: int
    seconds: float
    samples: int
    figures: dict[str, float]


class Meter:
    """Sums of figures between two log lines; they stay tensors until read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def read(self) -> dict[str, float]:
        """Means since the last reading."""
        means = {name: float(total) / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return means


class Clock:
    """Seconds of this run, those before a restart included, and how much of the budget they and the steps make."""

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
        """Seconds to the end of the budget at the speed so far (`first` = step this process started at)."""
        if self.budget.max_minutes:
            return max(0.0, 60 * self.budget.max_minutes - self.seconds())
        return (self.budget.max_steps - step) * (time.monotonic() - self.start) / max(1, step - first)


def step_rng(seed: int, step: int, *, part: int, device: torch.device) -> torch.Generator:
    """The randomness of one loss: a function of the run's seed and the step alone, so that a restart needs no state."""
    words = np.random.SeedSequence((seed, step, part)).generate_state(2, np.uint32)
    number = int(words[0]) << 31 | int(words[1]) >> 1
    torch.manual_seed(number ^ 1)  # what draws without a generator, such as dropout
    return torch.Generator(device).manual_seed(number)


@dataclass(frozen=True)
class Run:
    """What takes part in a run, and the folder it lives in. `batches(start)` opens the stream of batches at number `start`."""

    config: TrainConfig
    objective: Objective
    engine: Engine
    batches: Callable[[int], Iterator[Batch]]
    log: RunLog
    folder: Path


def train(run: Run) -> Outcome:
    """Train until the budget is used, from the newest checkpoint in the run folder when there is one.

    Raises Diverged when a loss or gradient is not finite.
    """
    config, objective, engine, log, folder = run.config, run.objective, run.engine, run.log, run.folder
    engine.prepare(objective)
    facts = engine.load(folder / "checkpoints", config.checkpoint.resume)
    first = step = int(facts.get("step", 0))
    clock = Clock(config, float(facts.get("seconds", 0.0)))
    used = int(facts.get("batches", 0))
    stream = run.batches(used)
    meter, figures, kept_at = Meter(), {}, time.monotonic()
    with log.open(step, config.budget.max_steps or None):
        while (progress := clock.progress(step)) < 1:
            lr = rate(step, progress, config.optim)
            for role in objective.turn(step):
                meter.add(_turn(run, role, stream, step=step, lr=lr))
                used += config.budget.accumulate
            step += 1
            last = clock.progress(step) >= 1
            if last or step % config.log.every_steps == 0:
                figures = meter.read()
                pace = (step - first) / (time.monotonic() - clock.start)
                samples = pace * config.budget.batch_size * config.budget.accumulate
                log.scalars(step, {**figures, "train/lr": lr, "perf/samples_per_second": samples, "perf/seconds_per_step": 1 / pace})
                loss = figures.get("train/student_loss", float("nan"))
                log.tick(step, loss, samples_per_second=samples, seconds_left=clock.left(step, first))
            if last or _due(config, step, kept_at):
                engine.save(folder / "checkpoints", step, {"batches": used, "seconds": clock.seconds(), "seed": config.seed})
                checkpoint.prune(folder / "checkpoints", config.checkpoint.keep)
                kept_at = time.monotonic()
    return Outcome(steps=step, seconds=clock.seconds(), samples=used * config.budget.batch_size, figures=figures)


def _due(config: TrainConfig, step: int, kept_at: float) -> bool:
    by_steps = config.checkpoint.every_steps and step % config.checkpoint.every_steps == 0
    return bool(by_steps) or time.monotonic() - kept_at > 60 * config.checkpoint.every_minutes


def _turn(run: Run, role: str, stream: Iterator[Batch], *, step: int, lr: float) -> dict[str, Tensor]:
    """Losses, gradients and one optimizer step of `role`; its figures."""
    config, device = run.config, run.engine.device
    half = torch.autocast(device.type, torch.bfloat16, enabled=config.speed.precision == "bfloat16")
    parts: list[dict[str, Tensor]] = []
    for part in range(config.budget.accumulate):
        batch = {name: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for name, v in next(stream).items()}
        rng = step_rng(config.seed, step, part=part, device=device)
        with half:
            loss, figures = run.objective.loss(role, batch, rng)
        run.engine.backward(role, loss / config.budget.accumulate)
        parts.append({f"{role}_loss": loss, **figures})
    norm = run.engine.step(role, rate=lr, step=step)
    means = {f"train/{name}": torch.stack([p[name].detach().float() for p in parts]).mean() for name in parts[0]}
    total = means[f"train/{role}_loss"]
    if not bool(torch.isfinite(total + norm)):
        tensors = {name: v.cpu().contiguous() for name, v in batch.items() if isinstance(v, Tensor)}
        save_file(tensors, run.folder / "diverged_batch.safetensors")
        raise Diverged(
            f"step {step}: loss {float(total):.4g} with gradient norm {float(norm):.4g} is not finite; the last good checkpoint "
            f"and the batch are kept in {run.folder}; try a smaller optim.lr={config.optim.lr}"
        )
    return {**means, f"train/{role}_grad_norm": norm.detach()}
