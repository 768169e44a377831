"""Judge a finished film: python launch/judge.py film=out.mp4 image=me.jpg audio=me.wav json=out.json."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sonic.app import Entry, launch  # noqa: E402
from sonic.config import JudgeConfig  # noqa: E402
from sonic.runs import Run  # noqa: E402


def score(config: JudgeConfig, run: Run) -> None:
    """Measure, show the table, write the JSON."""
    from sonic.infer.judge import judge  # numpy and the decoder: not before the command line is known to be right

    judge(config)


if __name__ == "__main__":
    launch(Entry("judge", JudgeConfig, collections=(), place=lambda config: ("runs", "judge")), score)
