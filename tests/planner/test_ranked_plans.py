"""Ranking of plans and proposals of changes, on made-up plans."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest

from sonic.cli import Entry, compose
from sonic.parallel.parallel_config import HardwareConfig, ParallelConfig, PlanConfig
from sonic.planner.plans import token_ranks
from sonic.planner.search import ranked, reason, search_plans
from sonic.planner.step_time import Seconds
from sonic.planner.video_candidates import candidates, fewer_steps
from sonic.planner.workload import workload

PLAN = Entry("plan", PlanConfig)
WIDE = ("model=live_avatar_14b", "run.dtype=bfloat16")


@dataclass
class Made:
    """A plan that consists of its figures only."""

    time: float
    peak: float
    uses_host_memory: bool = False
    missing: float = 0.0
    parallel: ParallelConfig = field(default_factory=lambda: ParallelConfig("single"))
    unit: str = "block"

    @property
    def seconds(self):
        return SimpleNamespace(total=self.time)

    @property
    def peak_gib(self):
        return [self.peak]

    def missing_gib(self, hardware):
        return self.missing


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        (Made(2.0, 9), Made(2.5, 3)),  # the faster
        (Made(2.03, 3), Made(2.0, 9)),  # the leaner of two that are as good as equally fast
        (Made(0.9, 3), Made(0.1, 9)),  # the leaner of two that are faster than the video is shown
        (Made(2.0, 9), Made(2.0, 3, uses_host_memory=True)),  # the one without offloading
        (Made(9.0, 9), Made(1.0, 3, missing=0.1)),  # the one that fits
        (Made(2.4, 9), Made(2.5, 3)),  # what does not fit says nothing of what is fast
    ],
)
def test_the_better_of_two_plans_comes_first_whatever_their_order(better, worse):
    for plans in ([better, worse], [worse, better]):
        assert ranked(plans, HardwareConfig(devices=1), 1.0) == (better, worse)


def test_ranks_that_share_tokens_have_equal_work_by_default():
    config = compose(PLAN, [*WIDE, "hardware=8x24gb"])
    work = replace(workload(config), width=16 * 13, height=16 * 10)
    tokens, heads = work.query_tokens // work.latent_frames, work.model.trunk.num_heads
    assert tokens % 8 and not heads % 8
    shares = {token_ranks(parallel, config.hardware) for parallel in candidates(config.parallel, work, config.hardware)}
    assert 2 in shares and not any(tokens % share or heads % share for share in shares)


@pytest.mark.parametrize(("compute", "bound"), [(3.0, "copying"), (5.0, "arithmetic")])
def test_a_plan_is_bound_by_arithmetic_where_that_takes_longer_than_all_copies_together(compute, bound):
    found = search_plans(compose(PLAN, [*WIDE, "hardware=8x80gb", "video=704x384"]))
    seconds = Seconds(compute=compute, weights=2.0, activations=2.0, vae=0.0, first=0.0)
    assert f"bound by {bound}" in reason(replace(found.chosen, seconds=seconds), found.hardware)


def test_fewer_steps_are_proposed_one_by_one_in_the_words_that_ask_for_them():
    proposed = list(fewer_steps(workload(compose(PLAN, [*WIDE, "hardware=8x24gb", "sampler=live_avatar_4step"]))))
    expected = [(f"{steps} steps instead of 4", (f"sampler.sample_steps={steps}",)) for steps in (3, 2, 1)]
    assert [(sentence, options) for sentence, options, _ in proposed] == expected
