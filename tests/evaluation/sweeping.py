"""Sweeps for tests, with a stand-in for the jobs of their cells."""

from __future__ import annotations

from functools import partial

import fake_score
import pytest

from sonic.cli import Entry, compose, run_command
from sonic.commands import ablate_command
from sonic.evaluation import sweep as sweeps
from sonic.evaluation.sweep import cells_of
from sonic.evaluation.sweep_config import AblateConfig

ENTRY = Entry("ablate", AblateConfig, collections=("ablate",))
GRID = "grid={sampler.sample_steps: [2, 4], weights: [teacher]}"


class Ended:
    """A job that was done in this process."""

    def __init__(self, execute, run):
        try:
            self.error = execute(run)
        except ValueError as error:
            self.error = error

    def done(self):
        return True

    def exception(self):
        return self.error


def sweep(made, folder, score=fake_score.score, *, processes=False):
    """The cells of a sweep that evaluates with a stand-in, in this process or in those of submitit."""
    cells = cells_of(made, folder)
    with pytest.MonkeyPatch.context() as patch:
        if processes:
            pytest.importorskip("submitit")
        else:
            patch.delitem(sweeps.ENGINES, "local")
            patch.setitem(sweeps.ENGINES, "local", lambda execute, config, folder: partial(Ended, execute))
            patch.setattr(sweeps, "POLL_S", 0)
        sweeps.sweep(made, cells, score, folder=folder)
    return cells


def write_report(cells, folder):
    pytest.importorskip("matplotlib")
    from sonic.evaluation.sweep_report import write_report

    return write_report(cells, folder, title="steps")


def config(*argv):
    return compose(ENTRY, ["clips=3", "num_videos=0", "seeds=[1,2]", "jobs=2", *argv])


def written(cells):
    """When each evaluation was made."""
    return {file: file.stat().st_mtime_ns for cell in cells for file in cell.folder.glob("seed_*")}


def ablate(*argv):
    return run_command(ablate_command.ENTRY, ablate_command.ablate, ["name=mine", *argv])
