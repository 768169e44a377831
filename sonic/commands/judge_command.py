"""The command judge: a finished video against its portrait and its recording."""

from __future__ import annotations

import logging
from typing import NoReturn

from sonic.cli import Entry, launch
from sonic.config import JudgeConfig
from sonic.system.run_folder import Run

ENTRY = Entry(
    "judge",
    JudgeConfig,
    collections=(),
    place=lambda config: ("runs", "judge"),
    example="film=out.mp4 image=me.jpg audio=me.wav json=out.json",
)

log = logging.getLogger("sonic.judge")


def score(config: JudgeConfig, run: Run) -> int:
    """Measure, show the table, write the JSON; exit code 1 for a film whose sound track is not the recording."""
    from sonic.evaluation.judge import judge, sound_fault  # numpy and the decoder: not before the command line is known to be right

    fault = sound_fault(judge(config))
    if fault:
        log.error("film=%s: %s", config.film, fault)
    return 1 if fault else 0


def main(argv: list[str]) -> NoReturn:
    """Leave the process with the exit code of the command."""
    launch(ENTRY, score, argv)
