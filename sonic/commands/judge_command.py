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
    """Measure, print the table, write the JSON, log to W&B if asked; exit code 1 for a video whose sound track is not the recording."""
    from sonic.evaluation.judge import judge, sound_fault  # slow imports, so only after the command line is checked
    from sonic.training.evaluation_log import log_judged
    from sonic.training.wandb_log import wants_wandb

    logged = wants_wandb(config.log)
    figures = judge(config)
    if logged:
        run.keep()
        log_judged(config, figures, run.open(), origin=(run.commit, run.command))
    if fault := sound_fault(figures):
        log.error("mp4=%s: %s", config.mp4, fault)
    return int(bool(fault))


main = partial(launch, ENTRY, score)
