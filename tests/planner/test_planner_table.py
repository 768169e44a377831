"""The lines of the tables in docs/planner.md: the estimates are within 5 % of the dry run. All lines with SONIC_SLOW=1, else three."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from sonic.cli import compose
from sonic.commands.plan_command import ENTRY, entry_of
from sonic.planner.search import search_plans
from sonic.planner.track import track
from sonic.training.plan_training import plan_training
from sonic.training.track_training import track_training

TABLES = (Path(__file__).resolve().parents[2] / "docs/planner.md").read_text()
LINES = re.findall(r"^\| `(?:python launch/plan\.py|sonic plan) ([^`]+)` \|", TABLES, re.MULTILINE)
QUICK = (
    "+preset=fast_preview model=live_avatar_14b hardware=4x24gb",
    "+preset=standard model=live_avatar_14b hardware=8x24gb",
    "model=sonic_svd video.size=512x512 hardware=4x24gb",
)
WITHIN = 0.05


@pytest.mark.parametrize("line", [line for line in LINES if line in QUICK or "SONIC_SLOW" in os.environ])
def test_estimates_of_the_table_are_within_five_percent_of_the_dry_run(line):
    argv = [item for item in line.split() if item != "verify=true"]
    entry = entry_of(argv)
    config = compose(entry, argv)
    found = search_plans(config) if entry is ENTRY else plan_training(config)
    tracked = track(found) if entry is ENTRY else track_training(config, found.chosen)
    measured = [max(rank.values()) for rank in tracked.ranks]
    print(f"\n{line}\n  estimated {_gib(found.chosen.peak_gib)} GiB\n  tracked   {_gib(measured)} GiB")
    assert found.chosen.peak_gib == pytest.approx(measured, rel=WITHIN)


def test_the_tables_have_lines_of_videos_and_of_trainings():
    assert set(QUICK) <= set(LINES)
    assert len(LINES) >= 19
    assert {entry_of(line.split()).name for line in LINES} == {"plan", "plan_training"}


def _gib(peaks: list[float]) -> str:
    return ", ".join(f"{peak:.2f}" for peak in peaks)
