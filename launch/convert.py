"""Published checkpoints become ready ones, once: python launch/convert.py source=Wan2.2-S2V-14B live_avatar=LiveAvatar output=FOLDER"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sonic.app import Entry, launch  # noqa: E402
from sonic.config import ConvertConfig  # noqa: E402
from sonic.runs import Run  # noqa: E402

ENTRY = Entry("convert", ConvertConfig, collections=(), place=lambda config: ("runs", "convert"))
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


if __name__ == "__main__":
    launch(ENTRY, convert, spelled(sys.argv[1:]))
