"""A fast stand-in for the evaluation of a sweep's cells: figures computed from the options. Jobs import it, so it imports nothing else."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

MEASURED = ("sync_correlation", "dynamics_ratio", "identity_psnr_db", "block_join_ratio", "silent_motion_ratio", "seconds_per_frame")


def score(argv: list[str]) -> None:
    """Write the figures; three steps fail, thirteen lose their process."""
    options = dict(item.split("=", 1) for item in argv)
    steps, seed = int(options["sampler.sample_steps"]), int(options["eval.seed"])
    if steps == 3:
        raise ValueError("three steps are not to be had")
    if steps == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    clips = [0.9 - 0.1 / steps + 0.01 * seed] * int(options["eval.clips"])
    figures = {"peak_rss_gib": 0.5 + steps / 10, "openings": [[0.0, 1.0 / steps, 0.0, -1.0]] * len(clips)}
    Path(options["json"]).parent.mkdir(parents=True, exist_ok=True)
    Path(options["json"]).write_text(json.dumps(figures | {name: {"clips": clips} for name in MEASURED}))


def score_until_stopped(argv: list[str]) -> None:
    """As `score`, but with seed 2 it writes its process id beside the results and waits."""
    options = dict(item.split("=", 1) for item in argv)
    if options["eval.seed"] != "2":
        return score(argv)
    Path(options["json"]).with_name("waits").write_text(str(os.getpid()))
    time.sleep(120)
    return None
