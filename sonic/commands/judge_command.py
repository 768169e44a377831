"""The command judge: compare a finished video with its portrait and its recording."""

from __future__ import annotations

import logging
from functools import partial

from sonic.cli import Entry, launch
from sonic.evaluation.judge_config import JudgeConfig
from sonic.system.run_folder import Run

ENTRY = Entry(
    "judge",
    JudgeConfig,
    collections=(),
    location=lambda config: ("runs", "judge"),
    example="mp4=out.mp4 image=me.jpg audio=me.wav json=out.json",
)

log = logging.getLogger("sonic.judge")


def score(config: JudgeConfig, run: Run) -> int:
    """Measure, print the table, write the JSON; exit code 1 for a video whose sound track is not the recording."""
    from sonic.evaluation.judge import judge, sound_fault  # slow imports, so only after the command line is checked

    fault = sound_fault(judge(config))
    if fault:
        log.error("mp4=%s: %s", config.mp4, fault)
    return 1 if fault else 0


main = partial(launch, ENTRY, score)
