"""The command convert: convert published checkpoints to the format of this program, and back."""

from __future__ import annotations

import logging
from functools import partial

from sonic.checkpoint.convert_config import ConvertConfig
from sonic.cli import Entry, launch
from sonic.system.run_folder import Run

log = logging.getLogger("sonic")


def with_equals(argv: list[str]) -> list[str]:
    """Replace `--to official`, the spelling of other converters, by to=official."""
    index = argv.index("--to") if "--to" in argv[:-1] else None
    return argv if index is None else [*argv[:index], f"to={argv[index + 1]}", *argv[index + 2 :]]


ENTRY = Entry(
    "convert",
    ConvertConfig,
    collections=(),
    rewrite=with_equals,
    location=lambda config: ("runs", "convert"),
    example="source=Wan2.2-S2V-14B live_avatar=LiveAvatar output=FOLDER",
)


def convert(config: ConvertConfig, run: Run) -> None:
    """Check all inputs, write the converted checkpoint to a temporary folder, and rename it."""
    from sonic.checkpoint.convert import DIRECTIONS

    run.keep()  # the next conversion reuses the finished files
    made = DIRECTIONS[config.to](config, config.model)
    log.info("%s", made.resolve())


main = partial(launch, ENTRY, convert)
