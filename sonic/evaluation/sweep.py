"""Sweeps: every combination (cell) of a grid of options is evaluated once per seed, in a process that submitit or Ray starts."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sonic.config import RunConfig
from sonic.evaluation import metrics
from sonic.evaluation.sweep_config import AblateConfig
from sonic.registry import Registry
from sonic.system.program import interpreter

LOG = logging.getLogger(__name__)
FIGURES = ("sync_correlation", "dynamics_ratio", "identity_psnr_db", "block_join_ratio", "silent_motion_ratio", "seconds_per_frame")
MACHINE = ("attention", "device", "dtype", "threads")  # options run.* that cells get when they are not the default
POLL_S = 0.2  # seconds between two looks at the running jobs

Score = Callable[[list[str]], None]  # evaluates with the options of a command line
Submit = Callable[[list[str]], Any]  # starts `score`; gives a job with done(), exception() and cancel(), as submitit and futures have


@dataclass(frozen=True)
class Cell:
    """One combination of the grid, the options that it is evaluated with, and the folder and seeds of its results."""

    choices: dict[str, Any]
    options: list[str]
    folder: Path
    seeds: list[int]

    @property
    def name(self) -> str:
        """Short name for reports and logs, as "option=value, ..."."""
        return ", ".join(f"{option.rpartition('.')[2]}={value}" for option, value in self.choices.items())

    @property
    def figures(self) -> dict[str, Any] | None:
        """The metrics over the clips of all seeds; None until all seeds are evaluated."""
        if not all(self.result_file(seed).is_file() for seed in self.seeds):
            return None
        results = [json.loads(self.result_file(seed).read_text()) for seed in self.seeds]
        joined = {name: metrics.mean_and_interval([clip for result in results for clip in result[name]["clips"]]) for name in FIGURES}
        openings = [track for result in results for track in result["openings"]]
        return {**joined, "openings": openings, "peak_rss_gib": max(result["peak_rss_gib"] for result in results)}

    @property
    def failure(self) -> str:
        """The errors of the seeds that failed; empty when none did."""
        return "\n".join(file.read_text() for seed in self.seeds if (file := self.failure_file(seed)).is_file())

    def result_file(self, seed: int) -> Path:
        """The JSON of one evaluation, which appears when it is finished."""
        return self.folder / f"seed_{seed}.json"

    def failure_file(self, seed: int) -> Path:
        """The error of one evaluation, which appears when it has failed."""
        return self.folder / f"seed_{seed}_failed.txt"

    def command(self, seed: int) -> list[str]:
        """The options of one evaluation."""
        return [*self.options, f"eval.seed={seed}", f"json={self.result_file(seed)}", f"eval.videos={self.folder / f'videos_{seed}'}"]


def cells_of(config: AblateConfig, folder: Path) -> list[Cell]:
    """All combinations of the grid except the excluded ones, in the order of the grid.

    The name of a cell's folder contains a hash of its options, so that results are found again only for the same options.
    """
    machine = [f"run.{name}={value}" for name in MACHINE if (value := getattr(config.run, name)) != getattr(RunConfig, name)]
    scored = [f"eval.clips={config.clips}", f"eval.seconds={config.seconds}", f"eval.num_videos={config.num_videos}"]
    plugins = [f"plugins=[{','.join(config.plugins)}]"] * bool(config.plugins)
    cells = []
    for values in itertools.product(*config.grid.values()):
        choices = dict(zip(config.grid, values, strict=True))
        if any(choices.items() >= excluded.items() for excluded in config.exclude):
            continue
        options = [*plugins, *config.common, *machine, *(f"{option}={_typed(value)}" for option, value in choices.items()), *scored]
        words = [f"{option.rpartition('.')[2]}-{value}" for option, value in choices.items()]
        words.append(hashlib.sha256(json.dumps(options).encode()).hexdigest()[:8])
        cells.append(Cell(choices, options, folder / "cells" / re.sub(r"[^A-Za-z0-9_.-]+", "-", "__".join(words)), config.seeds))
    return cells


def sweep(config: AblateConfig, folder: Path, score: Score) -> list[Cell]:
    """Evaluate every seed of every cell that is not finished, `config.jobs` at once; failed ones only with retry=true.

    Raises ValueError when a package is missing.
    """
    needed = ("submitit", "matplotlib", *["ray"] * (config.engine == "ray"))
    if missing := [name for name in needed if find_spec(name) is None]:
        raise ValueError(f"a sweep needs packages that are not installed here; run: pip install {' '.join(missing)}")
    cells = cells_of(config, folder.absolute())
    waiting = [(cell, seed) for cell in cells for seed in cell.seeds if not cell.result_file(seed).is_file()]
    waiting = [(cell, seed) for cell, seed in waiting if config.retry or not cell.failure_file(seed).is_file()]
    LOG.info("%d of %d cells are finished", sum(cell.figures is not None for cell in cells), len(cells))
    submit = ENGINES[config.engine](score, config, folder.absolute() / "jobs")
    for cell, seed, error in tqdm(run_jobs(waiting, submit, config.jobs), total=len(waiting), desc="evaluations", disable=not waiting):
        cell.failure_file(seed).unlink(missing_ok=True)
        if error is not None:
            cell.folder.mkdir(parents=True, exist_ok=True)
            cell.failure_file(seed).write_text(f"seed {seed}: {error}\n")
            LOG.warning("%s failed, see %s (retry=true tries it again)", cell.name, cell.failure_file(seed))
    return cells


def run_jobs(waiting: Sequence[tuple[Cell, int]], submit: Submit, at_once: int) -> Iterator[tuple[Cell, int, BaseException | None]]:
    """Evaluate seeds of cells in order, `at_once` at a time; yields each with its error when it has ended.

    When the caller is interrupted, the running ones are cancelled.
    """
    queue, running = list(waiting), {}
    try:
        while queue or running:
            while queue and len(running) < at_once:
                cell, seed = queue.pop(0)
                running[submit(cell.command(seed))] = cell, seed
            for job in [job for job in running if job.done()]:
                yield *running.pop(job), job.exception()
            time.sleep(POLL_S)
    finally:
        for job in running:
            job.cancel()


def _submitit(score: Score, config: AblateConfig, folder: Path) -> Submit:
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
    return lambda command: executor.submit(score, command)


def _ray(score: Score, config: AblateConfig, folder: Path) -> Submit:
    """Tasks of Ray, each in a process of its own."""
    import ray

    _, *variables, _ = interpreter()
    ray.init(ignore_reinit_error=True, runtime_env={"env_vars": dict(variable.split("=", 1) for variable in variables)})
    remote = ray.remote(max_calls=1, max_retries=0)(score)
    return lambda command: remote.remote(command).future()


ENGINES: Registry[Callable[[Score, AblateConfig, Path], Submit]] = Registry(
    "engine", {"local": _submitit, "submitit": _submitit, "ray": _ray}
)


def _typed(value: Any) -> str:
    """A value as written on the command line."""
    return str(value).lower() if isinstance(value, bool) else str(value).replace(" ", "")
