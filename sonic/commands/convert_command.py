"""The command convert: published checkpoints become ready ones, once, and ready ones published again."""

from __future__ import annotations

import logging
from typing import NoReturn

from sonic.cli import Entry, launch
from sonic.config import ConvertConfig
from sonic.system.run_folder import Run

EXAMPLE = "source=Wan2.2-S2V-14B live_avatar=LiveAvatar output=FOLDER"
ENTRY = Entry("convert", ConvertConfig, collections=(), place=lambda config: ("runs", "convert"), example=EXAMPLE)
log = logging.getLogger("sonic")


def convert(config: ConvertConfig, run: Run) -> None:
    """Check everything, then write the folder aside and give it its name."""
    from sonic.checkpoint.convert import DIRECTIONS

    run.keep()  # the next conversion takes over what this one has written
    made = DIRECTIONS[config.to](config, config.model)
    log.info("%s", made.resolve())


def spelled(argv: list[str]) -> list[str]:
    """`--to official`, as other converters have it, is to=official."""
    place = argv.index("--to") if "--to" in argv[:-1] else None
    return argv if place is None else [*argv[:place], f"to={argv[place + 1]}", *argv[place + 2 :]]


def main(argv: list[str]) -> NoReturn:
    """Leave the process with the exit code of the command."""
    launch(ENTRY, convert, spelled(argv))
