"""The command ablate: train, evaluate or plan a grid of options and write a report."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from sonic.cli import Entry, Job, compose, launch, run_command
from sonic.commands import evaluate_command, plan_command, train_command
from sonic.config import LoraConfig, SamplerConfig, one_of, require
from sonic.evaluation.evaluate_config import EvaluateConfig
from sonic.evaluation.sweep_config import AblateConfig
from sonic.system.allocator import keep_freed_memory
from sonic.system.caches import make_room_for_caches
from sonic.system.files import write_json
from sonic.system.run_folder import Run
from sonic.training.train_config import TrainConfig

if TYPE_CHECKING:  # it imports torch
    from sonic.evaluation.sweep import Cell, SeedRun

GRID = "grid."
CELLS_FAILED = 1
log = logging.getLogger("sonic")


def with_grid(argv: list[str]) -> list[str]:
    """Join all arguments of the form grid.OPTION=VALUES into one argument grid={OPTION: VALUES}, with the values as texts."""
    own = [item.removeprefix(GRID).partition("=") for item in argv if item.startswith(GRID)]
    rest = [item for item in argv if not item.startswith(GRID)]
    return [*rest, "grid=" + json.dumps({name: values for name, _, values in own}, ensure_ascii=False)] if own else rest


ENTRY = Entry("ablate", AblateConfig, collections=("ablate",), rewrite=with_grid, example="grid.sampler.sample_steps=2,4 name=mine")


def check_evaluation(config: EvaluateConfig) -> bool:
    """Raise ValueError for a model that cannot be evaluated on drawn people. Gives False: nothing follows an evaluation."""
    from sonic.evaluation.evaluate import portrait_side

    portrait_side(config)
    return False


def check_training(config: TrainConfig) -> bool:
    """Raise ValueError or OSError when the data set is missing. Gives whether what is trained can be evaluated on drawn people."""
    from sonic.training.build import DATASETS
    from sonic.training.objectives import OBJECTIVES
    from sonic.training.objectives.transformer import TransformerObjective

    one_of(config.data.source, list(DATASETS), "data.source")
    DATASETS[config.data.source](config.data)
    return bool(config.model.resolution) and issubclass(OBJECTIVES[config.objective.name], TransformerObjective)


@dataclass(frozen=True)
class SweptJob:
    """A job whose options can be swept: the entry of a command line, the job, its exit codes that are no failure, and what is checked of
    a cell's config before the sweep starts, which gives whether an evaluation can follow."""

    entry: Callable[[Sequence[str]], Entry]
    job: Job
    check: Callable[[Any], bool]
    fine: tuple[int, ...] = (0,)


JOBS: Mapping[str, SweptJob] = {
    "evaluate": SweptJob(lambda argv: evaluate_command.ENTRY, evaluate_command.score, check_evaluation),
    "train": SweptJob(lambda argv: train_command.ENTRY, train_command.train, check_training),
    "plan": SweptJob(plan_command.entry_of, plan_command.plan, lambda config: False, fine=(0, plan_command.NOTHING_FITS)),
}


def ablate(config: AblateConfig, run: Run) -> int:
    """Check all cells, run those that are not finished, then write the report. Exit code 1 when a cell failed."""
    from sonic.evaluation.sweep import cells_of, check_packages, sweep
    from sonic.training.wandb_log import log_cells, wants_wandb

    check_packages(config)
    wants_wandb(config.log)  # a missing package is found before anything is started
    cells = checked(cells_of(config, run.path), config.score)
    run.keep()  # finished cells survive a failed run
    folder = run.open().absolute()
    cells = [replace(cell, folder=folder / "cells" / cell.folder.name) for cell in cells]
    sweep(config, cells, execute, folder=folder)
    from sonic.evaluation.sweep_report import write_report  # imports matplotlib

    report = write_report(cells, folder, title=f"{folder.name}: {', '.join(config.grid)}")
    log_cells(cells, config.log, group=config.log.group or folder.name)
    log.info("%s", report.resolve())
    failed = sum(bool(cell.failure) for cell in cells)
    if failed:
        log.error("%d of %d cells failed; see %s, and retry=true", failed, len(cells), report)
    return CELLS_FAILED if failed else 0


def checked(cells: Sequence[Cell], score: bool | None) -> list[Cell]:
    """The cells with their whole configs, without those that equal an earlier one. Raises ValueError when any of them has a fault, after
    every fault was logged."""
    faults: dict[str, list[str]] = {}
    found: dict[str, Cell] = {}
    for cell in cells:
        try:
            made, follows = _composed(cell, score)
        except (ValueError, OSError) as error:
            faults.setdefault(str(error), []).append(cell.name)
            continue
        whole = asdict(made)
        same = found.setdefault(repr(whole), replace(cell, config=whole, scoring=cell.scoring if follows else []))
        if same.choices is not cell.choices:
            log.warning("%s is left out: all its options are those of %s", cell.name, same.name)
    for sentence, names in faults.items():
        log.error("%s%s: %s", "; ".join(names[:3]), f" and {len(names) - 3} more" if len(names) > 3 else "", sentence)
    count = sum(map(len, faults.values()))
    require(not faults, f"{count} of {len(cells)} cells cannot run, for the reasons above; nothing was started")
    return list(found.values())


def _composed(cell: Cell, score: bool | None) -> tuple[Any, bool]:
    """The typed config of a cell, and whether an evaluation follows. Raises ValueError or OSError when it cannot run."""
    swept = JOBS[cell.job]
    made = compose(swept.entry(cell.options), cell.options)
    possible = swept.check(made)
    require(possible or not score, "score=true: only transformers of the preview's kind can be evaluated on drawn people; leave score out")
    return made, possible and score is not False


def execute(run: SeedRun) -> None:
    """Do a run in this process, which a sweep has started. Raises the error that the job ended with."""
    make_room_for_caches()
    keep_freed_memory()
    swept = JOBS[run.job]
    errors: list[BaseException] = []

    def job(config: Any, folder: Run) -> int | None:
        try:
            code = swept.job(config, folder)
            if run.scoring and not code:
                evaluate_trained(config, run.scoring)
        except Exception as error:
            errors.append(error)
            raise
        return code

    entry = replace(swept.entry(run.options), location=lambda config: (str(run.folder.parent), run.folder.name))
    code = run_command(entry, job, run.options)
    if code not in swept.fine:
        raise errors[0] if errors else RuntimeError(f"it was stopped, with exit code {code}")
    if run.job == "train" and not run.scoring:
        write_json({}, run.result)


def evaluate_trained(config: TrainConfig, options: Sequence[str]) -> None:
    """Evaluate the exported weights of a training with its own sampler, or log.sample_steps Euler steps where it has none."""
    from sonic.evaluation.evaluate import evaluate

    model, made = config.model, compose(evaluate_command.ENTRY, options)
    adapters, weights = {"lora": LoraConfig(config.export)}, {"weights": config.export, "lora": LoraConfig()}
    model = replace(model, **(adapters if config.objective.learn.rank else weights))
    sampler = getattr(config.objective, "sampler", None) or SamplerConfig(sample_steps=config.log.sample_steps)
    evaluate(replace(made, model=model, sampler=sampler))


main = partial(launch, ENTRY, ablate)
