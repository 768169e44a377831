"""The command ablate: score a grid of options and write a report."""

from __future__ import annotations

import logging
from functools import partial

from sonic.cli import Entry, compose, launch
from sonic.commands.evaluate_command import ENTRY as EVALUATE
from sonic.evaluation.sweep_config import AblateConfig
from sonic.system.allocator import keep_freed_memory
from sonic.system.caches import make_room_for_caches
from sonic.system.run_folder import Run, start_logging

GRID = "grid."
log = logging.getLogger("sonic")


def with_grid(argv: list[str]) -> list[str]:
    """Join all arguments of the form grid.OPTION=[...] into one argument grid={OPTION: [...]}."""
    own = [item.removeprefix(GRID).partition("=") for item in argv if item.startswith(GRID)]
    rest = [item for item in argv if not item.startswith(GRID)]
    return [*rest, "grid={" + ", ".join(f"{name}: {values}" for name, _, values in own) + "}"] if own else rest


ENTRY = Entry("ablate", AblateConfig, collections=("ablate",), rewrite=with_grid, example="grid.sampler.sample_steps=[2,4] name=mine")


def ablate(config: AblateConfig, run: Run) -> None:
    """Score the cells that are not finished, then write the report."""
    from sonic.evaluation.sweep import sweep
    from sonic.evaluation.sweep_report import write_report
    from sonic.training.wandb_log import log_cells

    run.keep()  # finished cells survive a failed run
    folder = run.open()
    cells = sweep(config, folder, score)
    report = write_report(cells, folder, title=f"{folder.name}: {', '.join(config.grid)}")
    log_cells(cells, folder, config.log, group=folder.name)
    log.info("%s", report.resolve())
    if any(cell.failure for cell in cells):
        raise ValueError(f"{sum(bool(cell.failure) for cell in cells)} of {len(cells)} cells failed; see {report}, and retry=true")


def score(argv: list[str]) -> None:
    """Evaluate in this process, which a sweep has started, with the options of the command evaluate."""
    from sonic.evaluation.evaluate import evaluate

    make_room_for_caches()
    keep_freed_memory()
    start_logging(main=True)
    evaluate(compose(EVALUATE, argv))


main = partial(launch, ENTRY, ablate)
