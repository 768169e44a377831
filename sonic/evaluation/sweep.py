"""Ablation sweeps: every combination of a grid scored in a process of its own; what is finished is not done again."""

from __future__ import annotations

import itertools
import json
import logging
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sonic.config import RunConfig
from sonic.evaluation import metrics
from sonic.evaluation.sweep_config import AblateConfig
from sonic.system.program import process

LOG = logging.getLogger("sonic.training")
PROGRAM = process("evaluate")
DONE, FAILED, ASKED, LEFT = "figures.json", "failed.txt", "told.json", "left_"
FIGURES = ("sync_correlation", "dynamics_ratio", "identity_psnr_db", "block_join_ratio", "silent_motion_ratio", "seconds_per_frame")
STOPPED = (130, -signal.SIGINT, -signal.SIGTERM)  # how a program ends that was told to; the first is sonic.cli's own
MACHINE = ("attention", "device", "dtype", "threads")  # of run.*, what a cell runs on; not told where nobody said it
TAIL = 12  # lines of a failed cell's log that are shown

Jobs = Sequence[tuple[Path, list[list[str]]]]  # a cell's folder and its processes


@dataclass(frozen=True)
class Cell:
    """One combination of the grid, and the folder it is scored in."""

    choices: dict[str, Any]
    folder: Path

    @property
    def name(self) -> str:
        """What people call it."""
        return ", ".join(f"{knob.rpartition('.')[2]}={value}" for knob, value in self.choices.items())

    @property
    def figures(self) -> dict[str, Any] | None:
        """Its figures, None until it is finished."""
        file = self.folder / DONE
        return json.loads(file.read_text()) if file.is_file() else None

    @property
    def failure(self) -> str:
        """The end of the log of a cell that failed; empty for others."""
        file = self.folder / FAILED
        return file.read_text() if file.is_file() else ""

    @property
    def asked(self) -> list[str] | None:
        """What it was told when it was scored last; None when nobody wrote it down."""
        file = self.folder / ASKED
        return json.loads(file.read_text()) if file.is_file() else None

    def begin(self, asked: list[str]) -> None:
        """Write down what it is told."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / ASKED).write_text(json.dumps(asked, indent=1) + "\n")

    def leave(self) -> Path:
        """Set aside what is there, in the place of what was set aside before. Gives where it is."""
        aside = self.folder.with_name(f"{LEFT}{self.folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        self.folder.rename(aside)
        return aside

    def forget(self) -> None:
        """Remove what an earlier attempt left."""
        shutil.rmtree(self.folder, ignore_errors=True)


def cells_of(config: AblateConfig, folder: Path) -> list[Cell]:
    """All combinations of the grid that are not excluded, in its order."""
    knobs = list(config.grid)
    combinations = (dict(zip(knobs, values, strict=True)) for values in itertools.product(*config.grid.values()))
    wanted = (choices for choices in combinations if not any(choices.items() >= out.items() for out in config.exclude))
    return [Cell(choices, folder / "cells" / _slug(choices)) for choices in wanted]


def sweep(config: AblateConfig, folder: Path) -> list[Cell]:
    """Score every cell that is not finished as it is asked for now, `config.jobs` at once. Failed ones wait for retry=true."""
    cells = cells_of(config, folder)
    if config.retry:
        for cell in cells:
            if cell.failure:
                cell.forget()
    for cell in cells:
        if (cell.figures or cell.failure) and cell.asked not in (None, asked(config, cell)):
            LOG.info("%s was asked otherwise before; it is scored again, what there was is in %s", cell.name, cell.leave())
    waiting = [cell for cell in cells if cell.figures is None and not cell.failure]
    if len(waiting) < len(cells):
        LOG.info("%d of %d cells are there already", len(cells) - len(waiting), len(cells))
    for cell in waiting:
        cell.begin(asked(config, cell))
    jobs = [(cell.folder, commands(config, cell)) for cell in waiting]
    for _ in tqdm(ENGINES[config.engine](jobs, config), total=len(jobs), desc="cells", unit=" cells", disable=not jobs):
        pass
    for cell in cells:
        if cell.figures is None and not cell.failure:
            LOG.warning("%s was stopped; the same command scores it", cell.name)
        if cell.failure:
            LOG.warning("%s failed: %s (retry=true tries it again)", cell.name, cell.failure.strip().splitlines()[-1])
    return cells


def commands(config: AblateConfig, cell: Cell) -> list[list[str]]:
    """The processes of a cell, one for each seed."""
    where = lambda seed: [f"eval.seed={seed}", f"json={cell.folder / f'seed_{seed}.json'}", f"eval.videos={cell.folder / f'films_{seed}'}"]  # noqa: E731
    return [[*PROGRAM, *_told(config, cell), *where(seed)] for seed in config.seeds]


def asked(config: AblateConfig, cell: Cell) -> list[str]:
    """What a cell's figures depend on."""
    return [*_told(config, cell), f"seeds={_typed(config.seeds)}"]


def _told(config: AblateConfig, cell: Cell) -> list[str]:
    """What every process of a cell is told."""
    fixed = [f"{knob}={_typed(value)}" for knob, value in cell.choices.items()]
    scored = [f"eval.clips={config.clips}", f"eval.seconds={config.seconds}", f"eval.films={config.films}"]
    machine = [f"run.{name}={value}" for name in MACHINE if (value := getattr(config.run, name)) != getattr(RunConfig, name)]
    return [*config.common, *machine, *fixed, *scored]


def score(folder: Path, processes: Sequence[Sequence[str]]) -> None:
    """Run a cell's processes and join their figures; what goes wrong is written down where it happened, unless they were stopped."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob("seed_*.json"):  # by an attempt that was stopped, maybe with other seeds
        left.unlink()
    for left in folder.glob("films_*"):
        shutil.rmtree(left)
    with (folder / "log.txt").open("w") as log:
        for command in processes:
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
            if done.returncode in STOPPED:
                return
            if done.returncode:
                log.flush()
                fail(folder, f"exit code {done.returncode}", (folder / "log.txt").read_text())
                return
    found = [json.loads(file.read_text()) for file in sorted(folder.glob("seed_*.json"))]
    partial = folder / f"{DONE}.partial"
    partial.write_text(json.dumps(_joined(found), indent=1) + "\n")
    partial.rename(folder / DONE)


def fail(folder: Path, reason: str, said: str) -> None:
    """Write down that a cell failed, and the end of what was said."""
    (folder / FAILED).write_text("\n".join([reason, *said.strip().splitlines()[-TAIL:]]) + "\n")


def lost(folder: Path, error: Exception) -> None:
    """Write down that a cell's job was killed or its machine went, which its own processes could not; other cells are still wanted."""
    folder.mkdir(parents=True, exist_ok=True)
    fail(folder, f"its job ended with {type(error).__name__}", str(error))


def _locally(jobs: Jobs, config: AblateConfig) -> Iterator[None]:
    with ThreadPoolExecutor(config.jobs) as pool:
        yield from pool.map(lambda job: score(*job), jobs)


def _submitit(jobs: Jobs, config: AblateConfig) -> Iterator[None]:
    try:
        import submitit
    except ImportError:
        raise ValueError("engine=submitit needs the package submitit: pip install submitit; engine=local needs nothing") from None
    executor = submitit.AutoExecutor(folder=jobs[0][0].parents[1] / "slurm") if jobs else None
    if executor is not None:
        executor.update_parameters(slurm_array_parallelism=config.jobs, timeout_min=config.minutes)
        for (folder, _), job in zip(jobs, executor.map_array(score, *zip(*jobs, strict=True)), strict=True):
            error = job.exception()  # when it is done; Slurm may have killed it
            if error is not None:
                lost(folder, error)
            yield


def _ray(jobs: Jobs, config: AblateConfig) -> Iterator[None]:
    try:
        import ray
    except ImportError:
        raise ValueError("engine=ray needs the package ray: pip install ray; engine=local needs nothing") from None
    ray.init(ignore_reinit_error=True)
    remote = ray.remote(max_retries=0)(score)
    waiting, running = list(jobs), {}
    while waiting or running:
        while waiting and len(running) < config.jobs:
            job = waiting.pop(0)
            running[remote.remote(*job)] = job[0]
        [done], _ = ray.wait(list(running))
        folder = running.pop(done)
        try:
            ray.get(done)
        except ray.exceptions.RayError as error:
            lost(folder, error)
        yield


ENGINES: dict[str, Callable[[Jobs, AblateConfig], Iterator[None]]] = {
    "local": _locally,
    "submitit": _submitit,
    "ray": _ray,
}


def _joined(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Figures over the clips of all seeds: mean, half width of the 95 % interval, clips; and how open the mouth is in each clip."""
    joined: dict[str, Any] = {"peak_rss_gib": max(each["peak_rss_gib"] for each in found)}
    joined["openings"] = [track for each in found for track in each["openings"]]
    for figure in FIGURES:
        joined[figure] = metrics.interval([value for each in found for value in each[figure]["clips"]])
    return joined


def _slug(choices: dict[str, Any]) -> str:
    text = "__".join(f"{knob.rpartition('.')[2]}-{value}" for knob, value in choices.items())
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text)


def _typed(value: Any) -> str:
    """A value as the command line has it."""
    return str(value).lower() if isinstance(value, bool) else str(value).replace(" ", "")
