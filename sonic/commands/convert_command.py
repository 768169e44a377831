"""The command convert: convert published checkpoints to the format of this program, and back."""

from __future__ import annotations

import logging
from typing import NoReturn

from sonic.cli import Entry, launch
from sonic.config import ConvertConfig
from sonic.system.run_folder import Run

EXAMPLE = "source=Wan2.2-S2V-14B live_avatar=LiveAvatar output=FOLDER"
ENTRY = Entry("convert", ConvertConfig, collections=(), location=lambda config: ("runs", "convert"), example=EXAMPLE)
log = logging.getLogger("sonic")


def convert(config: ConvertConfig, run: Run) -> None:
    """Check all inputs, write the converted checkpoint to a temporary folder, and rename it."""
    from sonic.checkpoint.convert import DIRECTIONS

    run.keep()  # the next conversion reuses the finished files
    made = DIRECTIONS[config.to](config, config.model)
    log.info("%s", made.resolve())


def spelled(argv: list[str]) -> list[str]:
    """Replace `--to official`, the spelling of other converters, by to=official."""
    index = argv.index("--to") if "--to" in argv[:-1] else None
    return argv if index is None else [*argv[:index], f"to={argv[index + 1]}", *argv[index + 2 :]]


def main(argv: list[str]) -> NoReturn:
    """Run the command and exit the process with its exit code."""
    launch(ENTRY, convert, spelled(argv))
