"""The command judge: a finished video against its portrait and its recording."""

from __future__ import annotations

from typing import NoReturn

from sonic.app import Entry, launch
from sonic.config import JudgeConfig
from sonic.runs import Run

ENTRY = Entry(
    "judge",
    JudgeConfig,
    collections=(),
    place=lambda config: ("runs", "judge"),
    example="film=out.mp4 image=me.jpg audio=me.wav json=out.json",
)


def score(config: JudgeConfig, run: Run) -> None:
    """Measure, show the table, write the JSON."""
    from sonic.infer.judge import judge  # numpy and the decoder: not before the command line is known to be right

    judge(config)


def main(argv: list[str]) -> NoReturn:
    """Leave the process with the exit code of the command."""
    launch(ENTRY, score, argv)
