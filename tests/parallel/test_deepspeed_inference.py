"""The zero3 plan (DeepSpeed): the laws of every plan, and weights that are gathered only while they are used."""

from __future__ import annotations

import sys

import pytest
import torch
from plan_case import SINGLE, blocks_of, case_of, made_under_all, model_under, same_as_single
from ranks import on_ranks
from run_files import save_weights
from tiny import tiny_model

from sonic.inference.distributed_rollout import shutdown, worker_loop
from sonic.parallel.deepspeed_inference import allocate_slices
from sonic.parallel.mesh import World, degrees
from sonic.parallel.parallel_config import ParallelConfig

NEEDS = {"reason": "needs the extra [deepspeed]"}
ZERO = {
    "zero": ParallelConfig("zero3", prefetch=1),
    "zero on the host": ParallelConfig("zero3", cpu_offload=True, prefetch=0),
    "zero and context": ParallelConfig("zero3", context=2),
    "preview zero": ParallelConfig("zero3"),
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_weights(tiny_model(), path)
    return str(path)


@pytest.mark.parametrize(("count", "plans"), [(2, tuple(ZERO)), (4, ("zero on the host", "preview zero"))])
def test_zero3_makes_the_video_and_the_clip_of_one_rank(count, plans, weights):
    pytest.importorskip("deepspeed", **NEEDS)
    plans = {plan: ZERO[plan] for plan in plans}
    same_as_single(plans, on_ranks(count, made_under_all, SINGLE | plans, weights, timeout_s=240))


def halves(weights: str) -> tuple[bool, float]:
    """Whether a video in bfloat16 equals that of one rank, and the share of weights that are gathered while not in use."""
    case = case_of("tiny", weights)
    under, alone = (model_under(case, ParallelConfig(name), torch.bfloat16) for name in ("zero3", "single"))
    same = True
    if under.context.world.leads:
        found, wanted = (torch.cat(list(blocks_of(each, case)), dim=2) for each in (under, alone))
        shutdown(under.context)
        same = torch.equal(found, wanted)
    else:
        worker_loop(*under, torch.bfloat16)
    count = lambda module: sum(weight.numel() for weight in module.parameters())  # noqa: E731
    return same, count(under.model) / count(alone.model)


def test_weights_in_half_precision_are_gathered_only_while_they_are_used(weights):
    pytest.importorskip("deepspeed", **NEEDS)
    for same, whole in on_ranks(2, halves, weights, timeout_s=60):
        assert same
        assert whole < 0.15


def test_without_deepspeed_the_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ValueError, match="pip install deepspeed"):
        allocate_slices(tiny_model(), World("zero3", torch.device("cpu")), ParallelConfig("zero3"))


def test_copies_of_the_model_are_refused_with_the_plan_that_has_them():
    with pytest.raises(ValueError, match="use parallel=fsdp"):
        degrees(ParallelConfig("zero3", replicas=2), 4)
