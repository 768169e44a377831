"""What fits on which hardware, how fast it can be, and why: python launch/plan.py model=live_avatar_14b hardware=4x24gb"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sonic.app import Entry, launch  # noqa: E402
from sonic.parallel.planner import as_json, planned  # noqa: E402
from sonic.parallel.settings import PlanConfig  # noqa: E402
from sonic.runs import Run  # noqa: E402

ENTRY = Entry("plan", PlanConfig)
NOTHING_FITS = 3


def plan(config: PlanConfig, run: Run) -> int:
    """Plan, show the table, write the JSON; the exit code says whether anything fits."""
    from sonic.parallel.plan_table import show  # rich: not before the command line is known to be right

    found = planned(config)
    tracked = None
    if config.verify:
        from sonic.parallel.dry_run import track  # torch

        tracked = track(found.work, found.hardware, found.chosen)
    show(found, tracked)
    if config.json:
        Path(config.json).write_text(json.dumps(as_json(found, tracked), indent=2) + "\n")
    return 0 if found.fits else NOTHING_FITS


if __name__ == "__main__":
    launch(ENTRY, plan)
