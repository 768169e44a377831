"""Makes a video and a clip under any plan on any number of ranks, and compares them with those of one rank."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import NamedTuple

import pytest
import torch
from tiny import conditions, conditions_for, spans_of, tiny_config
from torch import Tensor

from sonic.checkpoint.bundled import weight_files
from sonic.checkpoint.lora import NO_LORA
from sonic.cli import Entry, compose
from sonic.config import ModelConfig, SamplerConfig
from sonic.inference.distributed_rollout import distributed_clip, distributed_rollout, shutdown, worker_loop
from sonic.inference.rollout import NoiseSource, Sampling
from sonic.model.dit import AvatarDiT
from sonic.parallel.context import DistributedContext, context_of
from sonic.parallel.mesh import World, make_world
from sonic.parallel.parallel_config import ParallelConfig, PlanConfig
from sonic.parallel.parallelize import build_parallel_model
from sonic.types import Conditions

CPU = torch.device("cpu")
SINGLE = {"tiny": ParallelConfig("single"), "preview": ParallelConfig("single")}


class Case(NamedTuple):
    """A model to make videos with."""

    config: ModelConfig
    weights: str
    conditions: Conditions
    blocks: int


class Under(NamedTuple):
    """A model and the context that it was built in."""

    model: AvatarDiT
    context: DistributedContext


class Made(NamedTuple):
    """The result of a rank: latents (on the first rank only) and parameter names."""

    blocks: Tensor | None
    clip: Tensor | None
    names: list[str]


def case_of(plan: str, weights: str) -> Case:
    """The preview with its own weights, or a tiny model."""
    if plan.startswith("preview"):
        config = compose(Entry("plan", PlanConfig), ["model=preview"]).model
        blocks = 2
        return Case(config, str(weight_files(config).dit), conditions_for(config, blocks * config.rollout.block_frames, (9, 12)), blocks)
    config, blocks = tiny_config(), 3
    return Case(config, weights, conditions(blocks * config.rollout.block_frames), blocks)


def model_under(case: Case, parallel: ParallelConfig, dtype: torch.dtype = torch.float32) -> Under:
    """The transformer under a plan."""
    world = World("single", CPU) if parallel.name == "single" else make_world(parallel, parallel.name, CPU)
    context = context_of(world, parallel)
    return Under(build_parallel_model(case.config, case.weights, context, lora=NO_LORA, dtype=dtype), context)


def made_under(plan: str, parallel: ParallelConfig, weights: str, *, give_up: bool = False, compiled: bool = False) -> Made:
    """A video and a clip under a plan, or the video alone where clips are refused; with `give_up` after two abandoned videos,
    one of which is closed at once and the other one later. The first rank says whether the others' blocks are `compiled`, too."""
    case = case_of(plan, weights)
    under = model_under(case, parallel)
    names, world = [name for name, _ in under.model.named_parameters()], under.context.world
    if not world.leads:
        worker_loop(*under, torch.float32)
        return Made(None, None, names)
    under.model.compiled = compiled
    late = blocks_of(under, case)
    if give_up:
        next(late)
        with closing(blocks_of(under, case)) as early:
            next(early)
    blocks = torch.cat(list(blocks_of(under, case)), dim=2)
    late.close()
    clip = None
    if world.stages == 1:
        clip = clip_of(under, case)
    else:
        with pytest.raises(ValueError, match="a clip with full attention"):
            clip_of(under, case)
    shutdown(under.context)
    return Made(blocks, clip, names)


def blocks_of(under: Under, case: Case):
    """Latents of the blocks, one after the other."""
    sampler = SamplerConfig(name="euler", schedule="linear", sample_steps=2, sample_guide_scale=2.0)
    spans = spans_of(case.blocks, case.config.rollout.block_frames)
    source = NoiseSource(torch.Generator().manual_seed(0))
    settings = {"sampling": Sampling(sampler, source), "context": under.context}
    for block in distributed_rollout(under.model, case.conditions, spans, **settings):
        yield block.latents


def clip_of(under: Under, case: Case) -> Tensor:
    """Latents of a clip with full attention."""
    sampler = SamplerConfig(name="unipc", schedule="unipc", sample_steps=2, sample_guide_scale=2.0)
    frames = case.blocks * case.config.rollout.block_frames
    settings = {"sampling": Sampling(sampler, NoiseSource(torch.Generator().manual_seed(0))), "context": under.context}
    return distributed_clip(under.model, case.conditions, frames, **settings)


def made_under_all(plans: dict[str, ParallelConfig], weights: str, given_up: Sequence[str] = ()) -> dict[str, Made]:
    """Run the plans one after the other in the same process, so that each must clean up after itself."""
    return {plan: made_under(plan, parallel, weights, give_up=plan in given_up) for plan, parallel in plans.items()}


def same_as_single(plans: dict[str, ParallelConfig], ranks: list[dict[str, Made]]) -> None:
    """Assert that videos and clips equal those of one rank: bit for bit, or up to the order of sums where ranks share tokens."""
    for plan, parallel in plans.items():
        first, single = ranks[0][plan], ranks[0]["preview" if plan.startswith("preview") else "tiny"]
        assert {name for rank in ranks for name in rank[plan].names} == set(single.names), plan
        staged = parallel.name == "pipeline" and len(ranks) > parallel.context
        assert (first.clip is None) == staged, plan
        close = parallel.name == "context" or parallel.context > 1
        for made, wanted in zip(first[:2], single[:2], strict=True):
            if made is not None:
                wrong = (made - wanted).abs().max() / wanted.abs().max()
                assert wrong <= (1e-5 if close else 0), f"{plan}: off by {wrong:.1e}"
