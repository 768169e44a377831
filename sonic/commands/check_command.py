"""The command check: find out whether the device of this machine computes rightly, fast and within the planned memory."""

from __future__ import annotations

from functools import partial

from sonic.check.check_config import CheckConfig
from sonic.cli import Entry, launch
from sonic.system.run_folder import Run

ENTRY = Entry("check", CheckConfig, collections=(), location=lambda config: (config.folder, ""), example="sections=[env,single]")


def check(config: CheckConfig, run: Run) -> int:
    """Run the sections, print figures and the summary; exit code 1 when a section fails."""
    from sonic.check.run_sections import run_sections  # imports torch, so only after the command line is checked

    return run_sections(config, run)


main = partial(launch, ENTRY, check)
