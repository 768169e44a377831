"""Judge a finished film: python launch/judge.py film=out.mp4 image=me.jpg audio=me.wav json=out.json."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sonic.app import Entry, launch  # noqa: E402
from sonic.config import JudgeConfig  # noqa: E402
from sonic.runs import Run  # noqa: E402

log = logging.getLogger("sonic.judge")


def score(config: JudgeConfig, run: Run) -> int:
    """Measure, show the table, write the JSON; exit code 1 for a film whose sound track is not the recording."""
    from sonic.infer.judge import judge, sound_fault  # numpy and the decoder: not before the command line is known to be right

    fault = sound_fault(judge(config))
    if fault:
        log.error("film=%s: %s", config.film, fault)
    return 1 if fault else 0


if __name__ == "__main__":
    launch(Entry("judge", JudgeConfig, collections=(), place=lambda config: ("runs", "judge")), score)
