"""Ablation sweeps: every combination (cell) of a grid of options is evaluated in processes of its own; finished cells are kept."""

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
DONE, FAILED, ASKED, LEFT = "figures.json", "failed.txt", "arguments.json", "left_"
FIGURES = ("sync_correlation", "dynamics_ratio", "identity_psnr_db", "block_join_ratio", "silent_motion_ratio", "seconds_per_frame")
STOPPED = (130, -signal.SIGINT, -signal.SIGTERM)  # return codes of an interrupted process; 130 is this program's own
MACHINE = ("attention", "device", "dtype", "threads")  # options run.* that cells get when they are not the default
TAIL = 12  # lines of a failed cell's log that are shown

Jobs = Sequence[tuple[Path, list[list[str]]]]  # a cell's folder and its processes


@dataclass(frozen=True)
class Cell:
    """One combination of the grid, and its folder."""

    choices: dict[str, Any]
    folder: Path

    @property
    def name(self) -> str:
        """Short name for reports and logs, as "option=value, ..."."""
        return ", ".join(f"{option.rpartition('.')[2]}={value}" for option, value in self.choices.items())

    @property
    def figures(self) -> dict[str, Any] | None:
        """The metrics of the cell; None until it is finished."""
        file = self.folder / DONE
        return json.loads(file.read_text()) if file.is_file() else None

    @property
    def failure(self) -> str:
        """The end of the log of a failed cell; empty for others."""
        file = self.folder / FAILED
        return file.read_text() if file.is_file() else ""

    @property
    def asked(self) -> list[str] | None:
        """The options of the last evaluation; None when there is no record of them."""
        file = self.folder / ASKED
        return json.loads(file.read_text()) if file.is_file() else None

    def begin(self, asked: list[str]) -> None:
        """Record the options of the evaluation that begins."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / ASKED).write_text(json.dumps(asked, indent=1) + "\n")

    def leave(self) -> Path:
        """Rename the folder to keep the old results, replacing those kept before. Returns the new path."""
        temporary = self.folder.with_name(f"{LEFT}{self.folder.name}")
        shutil.rmtree(temporary, ignore_errors=True)
        self.folder.rename(temporary)
        return temporary

    def forget(self) -> None:
        """Remove the folder of an earlier attempt."""
        shutil.rmtree(self.folder, ignore_errors=True)


def cells_of(config: AblateConfig, folder: Path) -> list[Cell]:
    """All combinations of the grid except the excluded ones, in the order of the grid."""
    options = list(config.grid)
    combinations = (dict(zip(options, values, strict=True)) for values in itertools.product(*config.grid.values()))
    wanted = (choices for choices in combinations if not any(choices.items() >= out.items() for out in config.exclude))
    return [Cell(choices, folder / "cells" / _slug(choices)) for choices in wanted]


def sweep(config: AblateConfig, folder: Path) -> list[Cell]:
    """Evaluate every cell that is not finished with the present options, `config.jobs` at once; failed ones only with retry=true."""
    cells = cells_of(config, folder)
    if config.retry:
        for cell in cells:
            if cell.failure:
                cell.forget()
    for cell in cells:
        if (cell.figures or cell.failure) and cell.asked not in (None, asked(config, cell)):
            LOG.info("%s was scored with other options; it is scored again, the old results are in %s", cell.name, cell.leave())
    waiting = [cell for cell in cells if cell.figures is None and not cell.failure]
    if len(waiting) < len(cells):
        LOG.info("%d of %d cells are finished already", len(cells) - len(waiting), len(cells))
    for cell in waiting:
        cell.begin(asked(config, cell))
    jobs = [(cell.folder, commands(config, cell)) for cell in waiting]
    for _ in tqdm(ENGINES[config.engine](jobs, config), total=len(jobs), desc="cells", unit=" cells", disable=not jobs):
        pass
    for cell in cells:
        if cell.figures is None and not cell.failure:
            LOG.warning("%s was stopped; run the same command again to score it", cell.name)
        if cell.failure:
            LOG.warning("%s failed: %s (retry=true tries it again)", cell.name, cell.failure.strip().splitlines()[-1])
    return cells


def commands(config: AblateConfig, cell: Cell) -> list[list[str]]:
    """The command lines of a cell, one for each seed."""
    where = lambda seed: [f"eval.seed={seed}", f"json={cell.folder / f'seed_{seed}.json'}", f"eval.videos={cell.folder / f'videos_{seed}'}"]  # noqa: E731
    return [[*PROGRAM, *_arguments(config, cell), *where(seed)] for seed in config.seeds]


def asked(config: AblateConfig, cell: Cell) -> list[str]:
    """The options that a cell's metrics depend on."""
    return [*_arguments(config, cell), f"seeds={_typed(config.seeds)}"]


def _arguments(config: AblateConfig, cell: Cell) -> list[str]:
    """The options of every process of a cell, apart from the seed and the outputs."""
    fixed = [f"{option}={_typed(value)}" for option, value in cell.choices.items()]
    scored = [f"eval.clips={config.clips}", f"eval.seconds={config.seconds}", f"eval.num_videos={config.num_videos}"]
    machine = [f"run.{name}={value}" for name in MACHINE if (value := getattr(config.run, name)) != getattr(RunConfig, name)]
    return [*config.common, *machine, *fixed, *scored]


def score(folder: Path, processes: Sequence[Sequence[str]]) -> None:
    """Run a cell's processes and join their metrics. A failure is recorded in the cell's folder; an interruption is not."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("seed_*.json"):  # of an interrupted attempt, perhaps with other seeds
        old.unlink()
    for old in folder.glob("videos_*"):
        shutil.rmtree(old)
    with (folder / "log.txt").open("w") as log:
        for command in processes:
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
            if done.returncode in STOPPED:
                return
            if done.returncode:
                log.flush()
                fail(folder, f"exit code {done.returncode}", (folder / "log.txt").read_text())
                return
    results = [json.loads(file.read_text()) for file in sorted(folder.glob("seed_*.json"))]
    partial = folder / f"{DONE}.partial"
    partial.write_text(json.dumps(_joined(results), indent=1) + "\n")
    partial.rename(folder / DONE)


def fail(folder: Path, reason: str, output: str) -> None:
    """Record that a cell failed, with the end of its output."""
    (folder / FAILED).write_text("\n".join([reason, *output.strip().splitlines()[-TAIL:]]) + "\n")


def lost(folder: Path, error: Exception) -> None:
    """Record that a cell's job was killed or its machine lost, which the job itself could not; the sweep goes on."""
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


def _joined(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Metrics over the clips of all seeds: mean, half width of the 95 % interval, values of the clips; and all mouth openings."""
    joined: dict[str, Any] = {"peak_rss_gib": max(result["peak_rss_gib"] for result in results)}
    joined["openings"] = [track for result in results for track in result["openings"]]
    for figure in FIGURES:
        joined[figure] = metrics.interval([value for result in results for value in result[figure]["clips"]])
    return joined


def _slug(choices: dict[str, Any]) -> str:
    text = "__".join(f"{option.rpartition('.')[2]}-{value}" for option, value in choices.items())
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text)


def _typed(value: Any) -> str:
    """A value as written on the command line."""
    return str(value).lower() if isinstance(value, bool) else str(value).replace(" ", "")
