"""A portrait and a recording become a talking video: python launch/infer.py +preset=fast_preview image=me.jpg audio=me.wav"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sonic.app import Entry, launch  # noqa: E402
from sonic.config import InferConfig  # noqa: E402
from sonic.runs import Run  # noqa: E402

ENTRY = Entry("infer", InferConfig)


def main(config: InferConfig, run: Run) -> None:
    """Load the parts, make the video, leave its papers in the run folder."""
    from sonic.infer.job import run_job  # torch and the models: not before the command line is known to be right

    run_job(config, run)


if __name__ == "__main__":
    launch(ENTRY, main)
