"""Every plan gives the video, the clip and the parameter names of one rank."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from plan_case import SINGLE, Made, case_of, clip_of, made_under, made_under_all, model_under, same_as_single
from ranks import on_ranks
from run_files import save_weights
from tiny import tiny_model
from torch.testing import assert_close

from sonic.inference.distributed_rollout import shutdown, worker_loop
from sonic.model.compile import COMPILE_TIME
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
    elsewhere = {"single", "zero3", "windows"}  # the last two have tests of their own
    assert {plan.name for plan in plans.values()} == set(PLAN_NAMES) - elsewhere
    same_as_single(plans, on_ranks(count, made_under_all, SINGLE | plans, weights, GIVEN_UP, timeout_s=240))


def compiled_under(plans: dict[str, ParallelConfig], weights: str) -> dict[str, tuple[Made, int]]:
    """What a rank makes under each plan with compiled regions, and how often it has compiled until then; without generating code."""
    torch.compile = partial(torch.compile, backend="eager")
    return {plan: (made_under(plan, parallel, weights, compiled=True), COMPILE_TIME.number) for plan, parallel in plans.items()}


def test_every_plan_runs_compiled_on_all_its_ranks(weights):
    """The plans with the most hooks of each kind; a rank compiles at its first video and whenever its share has another shape."""
    plain = made_under("tiny", SINGLE["tiny"], weights)
    plans = {name: TINY[name] for name in ("pipeline", "fsdp sublayer", "offload", "context")}
    first, second = on_ranks(2, compiled_under, plans, weights)
    assert all(number for _, number in (*first.values(), *second.values()))
    for name, (made, _) in first.items():
        assert_close(made.blocks, plain.blocks, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
        if made.clip is not None:
            assert_close(made.clip, plain.clip, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


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
