"""Sweeps: every combination (cell) of a grid of options is trained, evaluated or planned once per seed, in a process that submitit or
Ray starts."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import re
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from sonic.config import RunConfig
from sonic.evaluation import metrics
from sonic.evaluation.sweep_config import CLIPS, AblateConfig
from sonic.registry import Registry
from sonic.system.program import interpreter
from sonic.system.stdio import interrupt_on_signals
from sonic.training.train_config import LogConfig, WandbConfig

LOG = logging.getLogger(__name__)
FIGURES = ("sync_correlation", "dynamics_ratio", "identity_psnr_db", "block_join_ratio", "silent_motion_ratio", "seconds_per_frame")
LEARNT = ("loss", "grad_norm")  # last words of the names of a training's figures that a report shows
MACHINE = ("attention", "device", "dtype", "threads")  # options run.* that cells get when they are not the default
SCORED_SEED = 1  # of the clips that trainings are scored on, the same for all
NAME_CHARACTERS = 120  # of a cell's choices in the name of its folder
POLL_S, PATIENCE_S = 0.2, 120  # seconds between two looks at the running jobs, and for which cancelled ones may save what they have


@dataclass(frozen=True)
class SeedRun:
    """One seed of a cell, for which a process is started: the options of its job, those of an evaluation that follows a training, the
    folder of the run, and the JSON file that is there when all is done."""

    job: str
    options: list[str]
    scoring: list[str]
    folder: Path
    result: Path


Execute = Callable[[SeedRun], None]
Submit = Callable[[SeedRun], Any]  # starts it; gives a job with done(), exception() and cancel(), as submitit and futures have


@dataclass(frozen=True)
class Cell:
    """One combination of the grid: the options of its job, `scoring` of the evaluation after a training (empty = none), `logged` of its
    log, and where the results of its seeds are. `config` is the whole config, once it has been checked; `number` stands in the report."""

    number: int
    job: str
    choices: dict[str, Any]
    options: list[str]
    scoring: list[str]
    logged: list[str]
    folder: Path
    seeds: list[int]
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Short name for reports and logs, as "option=value, ..."."""
        return ", ".join(f"{_short(option)}={value}" for option, value in self.choices.items())

    @property
    def figures(self) -> dict[str, Any] | None:
        """The figures over all seeds: {mean, ci95, clips}, numbers or words. None until all seeds are finished."""
        if len(found := list(self.seed_figures.values())) < len(self.seeds):
            return None
        joined = dict(found[0])  # numbers and words
        for name, figure in found[0].items():
            if isinstance(figure, dict):
                joined[name] = _of(figure["of"], [clip for each in found if name in each for clip in each[name]["clips"]])
            elif isinstance(figure, list):
                joined[name] = [track for each in found for track in each[name]]
        return joined

    @property
    def seed_figures(self) -> dict[int, dict[str, Any]]:
        """The same of every finished seed, besides `of`, what a figure has several values of: clip or seed."""
        found = {}
        for seed in filter(lambda each: self.result_file(each).is_file(), self.seeds):
            result = json.loads(self.result_file(seed).read_text())
            figures = {name: _of("seed", [value]) for name, value in _trained(self.curve(seed)).items()} if self.job == "train" else {}
            if FIGURES[0] in result:  # it was evaluated
                figures |= {name: _of("clip", result[name]["clips"]) for name in FIGURES}
                figures["openings"] = result["openings"]
            if self.job == "evaluate":
                figures["peak_gib"] = result["peak_rss_gib"]
            found[seed] = _planned(result) if self.job == "plan" else figures
        return found

    @property
    def failure(self) -> str:
        """The errors of the seeds that failed; empty when none did."""
        return "\n".join(file.read_text() for seed in self.seeds if (file := self.failure_file(seed)).is_file())

    def result_file(self, seed: int) -> Path:
        """The JSON of one seed, which appears when it is finished; other evaluations of the same training have other names."""
        return self.folder / f"{f'scored_{_hash(self.scoring)}_' if self.scoring else ''}seed_{seed}.json"

    def failure_file(self, seed: int) -> Path:
        """The error of one seed, which appears when it has failed."""
        return self.folder / f"seed_{seed}_failed.txt"

    def run_folder(self, seed: int) -> Path:
        """The folder of the run of one seed."""
        return self.folder / f"run_{seed}"

    def curve(self, seed: int) -> list[dict[str, float]]:
        """The lines of a training's log so far, with the seconds of training until each."""
        path, lines, step, seconds = self.run_folder(seed) / "scalars.jsonl", [], 0, 0.0
        for line in path.read_text().splitlines() if path.is_file() else ():
            values = json.loads(line)
            seconds, step = seconds + (values["step"] - step) * values.get("perf/seconds_per_step", 0.0), values["step"]
            lines.append({**values, "train_seconds": seconds})
        return lines

    def run_of(self, seed: int) -> SeedRun:
        """What is to be done for one seed."""
        result, run = self.result_file(seed), self.run_folder(seed)
        written = [f"json={result}", f"eval.videos={self.folder / f'videos_{seed}'}"]
        own = {
            "evaluate": [f"eval.seed={seed}", *written, *self.logged],
            "train": [f"seed={seed}", f"name={self.name}, seed {seed}", f"export={run / 'weights.safetensors'}", *self.logged],
            "plan": written[:1],
        }
        scoring = self.scoring and [*self.scoring, f"eval.seed={SCORED_SEED}", *written]
        return SeedRun(self.job, [*self.options, *own[self.job]], scoring, run, result)


def cells_of(config: AblateConfig, folder: Path) -> list[Cell]:
    """All combinations of the grid except the excluded ones, in the order of the grid.

    The name of a cell's folder contains a hash of its options, so that results are found again only for the same options.
    """
    machine = _changed("run", config.run, RunConfig, names=MACHINE)
    schema = {"evaluate": WandbConfig, "train": LogConfig}.get(config.job)
    logged = _changed("log", config.log, schema, names=[each.name for each in fields(schema)]) if schema else []
    logged += [f"log.group={folder.name}"] if logged and config.log.wandb != "off" and not config.log.group else []
    plugins = [f"plugins=[{','.join(config.plugins)}]"] * bool(config.plugins)
    scored = [f"eval.{name}={getattr(config, name)}" for name in CLIPS]
    cells = []
    for values in itertools.product(*config.grid.values()):
        choices = dict(zip(config.grid, values, strict=True))
        if any(choices.items() >= excluded.items() for excluded in config.exclude):
            continue
        chosen = [f"{option}={_typed(value)}" for option, value in choices.items()]
        before, after = {"evaluate": (machine, scored), "train": ([], []), "plan": (machine, [])}[config.job]
        options = [*plugins, *config.common, *before, *chosen, *after]
        words = "__".join(f"{_short(option)}-{_typed(value)}" for option, value in choices.items())
        name = f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', words)[:NAME_CHARACTERS]}__{_hash(options)}"
        scoring = [*plugins, *machine, *scored] if config.job == "train" and config.score is not False else []
        cells.append(Cell(len(cells) + 1, config.job, choices, options, scoring, logged, folder / "cells" / name, config.seeds))
    return cells


def sweep(config: AblateConfig, cells: Sequence[Cell], execute: Execute, *, folder: Path) -> None:
    """Run every seed of every cell that is not finished, `config.jobs` at once; failed ones only with retry=true."""
    waiting = [(cell, seed) for cell in cells for seed in cell.seeds if not cell.result_file(seed).is_file()]
    waiting = [(cell, seed) for cell, seed in waiting if config.retry or not cell.failure_file(seed).is_file()]
    LOG.info("%d of %d cells are finished", sum(cell.figures is not None for cell in cells), len(cells))
    submit = ENGINES[config.engine](execute, config, folder.absolute() / "jobs")
    for cell, seed, error in tqdm(run_jobs(waiting, submit, config.jobs), total=len(waiting), desc="runs", disable=not waiting):
        cell.failure_file(seed).unlink(missing_ok=True)
        if error is not None:
            cell.folder.mkdir(parents=True, exist_ok=True)
            cell.failure_file(seed).write_text(f"seed {seed}: {error}\n")
            LOG.warning("%s failed, see %s (retry=true tries it again)", cell.name, cell.failure_file(seed))


def check_packages(config: AblateConfig) -> None:
    """Raise ValueError when a package that a sweep needs is missing."""
    needed = ("submitit", "matplotlib", *["ray"] * (config.engine == "ray"))
    if missing := [name for name in needed if find_spec(name) is None]:
        raise ValueError(f"a sweep needs packages that are not installed here; run: pip install {' '.join(missing)}")


def run_jobs(waiting: Sequence[tuple[Cell, int]], submit: Submit, at_once: int) -> Iterator[tuple[Cell, int, BaseException | None]]:
    """Run seeds of cells in order, `at_once` at a time; yields each with its error when it has ended.

    When the caller is interrupted, the running ones are cancelled, and have time to save what they have.
    """
    queue, running = list(waiting), {}
    try:
        while queue or running:
            while queue and len(running) < at_once:
                cell, seed = queue.pop(0)
                running[submit(cell.run_of(seed))] = cell, seed
            for job in [job for job in running if job.done()]:
                yield *running.pop(job), job.exception()
            time.sleep(POLL_S)
    finally:
        if running:
            LOG.warning("%d runs are asked to stop; the same command continues the sweep", len(running))
        for job in running:
            job.cancel()
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until and not all(job.done() for job in running):
            time.sleep(POLL_S)


def run_until_signal(execute: Execute, run: SeedRun) -> None:
    """Do a run in this process, which ends at SIGTERM, and at the signal that submitit sends before the time is over.

    Raises RuntimeError when it is stopped."""
    interrupt_on_signals()
    signal.signal(signal.SIGUSR2, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        execute(run)
    except KeyboardInterrupt as error:
        raise RuntimeError("it was stopped by a signal, as at the end of its time (minutes=)") from error


class LocalJob(NamedTuple):
    """A job of submitit on this machine, which is cancelled by SIGTERM: submitit itself would kill it after a second."""

    done: Callable[[], bool]
    exception: Callable[[], BaseException | None]
    cancel: Callable[[], None]


def _submitit(execute: Execute, config: AblateConfig, folder: Path) -> Submit:
    """Jobs of submitit: processes on this machine with engine=local, otherwise jobs of Slurm where there is one."""
    import submitit

    gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = ["-u", "CUDA_VISIBLE_DEVICES"] if gpus is None else [f"CUDA_VISIBLE_DEVICES={gpus}"]  # which submitit hides from local jobs
    executor = submitit.AutoExecutor(
        folder,
        "local" if config.engine == "local" else None,
        local_python=shlex.join(["env", *visible, *interpreter()]),
        slurm_python=shlex.join(interpreter()),
    )
    executor.update_parameters(timeout_min=config.minutes)

    def submit(run: SeedRun) -> Any:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # new processes inherit this: Ctrl-C is for the sweep alone
        try:
            job = executor.submit(run_until_signal, execute, run)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if executor.cluster != "local":
            return job
        return LocalJob(job.done, job.exception, partial(os.kill, int(job.job_id), signal.SIGTERM))

    return submit


def _ray(execute: Execute, config: AblateConfig, folder: Path) -> Submit:
    """Tasks of Ray, each in a process of its own."""
    import ray

    _, *variables, _ = interpreter()
    ray.init(ignore_reinit_error=True, runtime_env={"env_vars": dict(variable.split("=", 1) for variable in variables)})
    remote = ray.remote(max_calls=1, max_retries=0)(execute)
    return lambda run: remote.remote(run).future()


ENGINES: Registry[Callable[[Execute, AblateConfig, Path], Submit]] = Registry(
    "engine", {"local": _submitit, "submitit": _submitit, "ray": _ray}
)


def _of(kind: str, values: Sequence[float]) -> dict[str, Any]:
    """A figure that has a value for each clip or seed."""
    return metrics.mean_and_interval(values) | {"of": kind}


def _trained(curve: Sequence[dict[str, float]]) -> dict[str, float]:
    """The figures of a training at its end."""
    last = curve[-1] if curve else {}
    return {name: last[name] for name in last if name.endswith(LEARNT) or name in ("step", "train_seconds")}


def _planned(result: dict[str, Any]) -> dict[str, Any]:
    """The figures of the best plan, by the JSON of the command plan."""
    best = result["chosen"]
    pace = "seconds_per_step" if "seconds_per_step" in best else "seconds_per_frame"  # of a training, of a video
    fits = {"plan": best["plan"], "fits": "yes" if result["fits"] else "no", pace: best[pace]}
    return {**fits, "peak_gib": max(best["peak_gib_per_rank"]), "why": best["reason"]}


def _changed(group: str, given: Any, schema: type, *, names: Sequence[str]) -> list[str]:
    """The options of a group that are not the default."""
    return [f"{group}.{name}={_typed(value)}" for name in names if (value := getattr(given, name)) != getattr(schema(), name)]


def _hash(options: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(options).encode()).hexdigest()[:8]


def _short(option: str) -> str:
    """The last part of the name of an option."""
    return option.rpartition(".")[2].lstrip("+")


def _typed(value: Any) -> str:
    """A value as written on the command line."""
    if isinstance(value, list):
        return f"[{','.join(map(_typed, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
