"""The command ablate: a grid of runs scored and drawn."""

from __future__ import annotations

import logging
from typing import NoReturn

from sonic.cli import Entry, launch
from sonic.evaluation.sweep_config import AblateConfig
from sonic.system.run_folder import Run

ENTRY = Entry("ablate", AblateConfig, collections=("ablate",), example="grid.sampler.sample_steps=[2,4] name=mine")
GRID = "grid."
log = logging.getLogger("sonic")


def ablate(config: AblateConfig, run: Run) -> None:
    """Score what is not scored yet, then draw the report."""
    from sonic.evaluation.sweep import sweep
    from sonic.evaluation.sweep_report import write_report
    from sonic.training.log import log_cells

    run.keep()  # finished cells
    folder = run.open()
    cells = sweep(config, folder)
    report = write_report(cells, folder, title=f"{run.name}: {', '.join(config.grid)}")
    log_cells(cells, folder, config.log, group=run.name)
    log.info("%s", report.resolve())
    if any(cell.failure for cell in cells):
        raise ValueError(f"{sum(bool(cell.failure) for cell in cells)} of {len(cells)} cells failed; see {report}, and retry=true")


def gathered(argv: list[str]) -> list[str]:
    """grid.KNOB=[...] items as one grid={KNOB: [...]}."""
    own = [item.removeprefix(GRID).partition("=") for item in argv if item.startswith(GRID)]
    rest = [item for item in argv if not item.startswith(GRID)]
    return [*rest, "grid={" + ", ".join(f"{name}: {values}" for name, _, values in own) + "}"] if own else rest


def main(argv: list[str]) -> NoReturn:
    """Leave the process with the exit code of the command."""
    launch(ENTRY, ablate, gathered(argv))
