"""Every plan gives the video, the clip and the parameter names of one rank."""

from __future__ import annotations

import pytest
import torch
from plan_case import SINGLE, case_of, clip_of, made_under_all, model_under, same_as_single
from ranks import on_ranks
from run_files import save_weights
from tiny import tiny_model

from sonic.inference.distributed_rollout import shutdown, worker_loop
from sonic.parallel.parallel_config import PLAN_NAMES, ParallelConfig

TINY = {  # every part of the 14B model, a few numbers wide
    "fsdp block": ParallelConfig("fsdp", unshard_unit="block", prefetch=0),
    "fsdp sublayer": ParallelConfig("fsdp", unshard_unit="sublayer", prefetch=2),
    "fsdp linear": ParallelConfig("fsdp", unshard_unit="linear", prefetch=1),
    "fsdp on the host": ParallelConfig("fsdp", unshard_unit="block", cpu_offload=True),
    "fsdp kept": ParallelConfig("fsdp", reshard=False),
    "hsdp": ParallelConfig("fsdp", unshard_unit="block", replicas=2),
    "pipeline": ParallelConfig("pipeline"),
    "offload": ParallelConfig("offload", replicas=-1),
    "offload from the file": ParallelConfig("offload", replicas=-1),
    "context": ParallelConfig("context"),
    "fsdp and context": ParallelConfig("fsdp", unshard_unit="block", context=2),
    "pipeline and context": ParallelConfig("pipeline", context=2),
}
TINY["offload from the file"].offload.store = "mmap"
PREVIEW = {
    "preview fsdp": ParallelConfig("fsdp", prefetch=1),
    "preview pipeline": ParallelConfig("pipeline"),
    "preview offload": ParallelConfig("offload", replicas=-1),
    "preview context": ParallelConfig("context"),
}
GIVEN_UP = ("fsdp kept", "pipeline", "context", "pipeline and context")  # after abandoned videos


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_weights(tiny_model(), path)
    return str(path)


@pytest.mark.parametrize("count", [2, 4])
def test_every_plan_makes_the_video_and_the_clip_of_one_rank(count, weights):
    plans = TINY | PREVIEW
    assert {plan.name for plan in plans.values()} == set(PLAN_NAMES) - {"single", "zero3"}  # zero3 has a test of its own
    same_as_single(plans, on_ranks(count, made_under_all, SINGLE | plans, weights, GIVEN_UP, timeout_s=240))


def refused_clip(weights: str) -> str:
    """The error of the first rank of a pipeline for a clip."""
    case = case_of("tiny", weights)
    under = model_under(case, ParallelConfig("pipeline"))
    if not under.context.world.leads:
        worker_loop(*under, torch.float32)
        return ""
    with pytest.raises(ValueError) as refused:
        clip_of(under, case)
    shutdown(under.context)
    return str(refused.value)


def test_a_pipeline_refuses_clips_with_the_plan_that_makes_them(weights):
    output, _ = on_ranks(2, refused_clip, weights, timeout_s=60)
    assert "use parallel=fsdp" in output
