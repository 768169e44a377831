"""A film and a clip under any plan on any number of ranks, and how they must compare with those of one rank."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import NamedTuple

import torch
from tiny import conditions, conditions_for, spans_of, tiny_config
from torch import Tensor

from sonic.app import Entry, compose
from sonic.config import ModelConfig, SamplerConfig
from sonic.infer.build import weight_files
from sonic.infer.ranks import clip_together, dismiss, follow, rollout_together
from sonic.infer.rollout import Draws
from sonic.model.dit import AvatarDiT
from sonic.parallel.load import Lora
from sonic.parallel.mesh import World, make_world
from sonic.parallel.settings import ParallelConfig, PlanConfig
from sonic.parallel.spread import Company, spread_model
from sonic.types import Conditions

CPU = torch.device("cpu")
SINGLE = {"tiny": ParallelConfig("single"), "preview": ParallelConfig("single")}


class Case(NamedTuple):
    """A model to make films with."""

    config: ModelConfig
    weights: str
    told: Conditions
    blocks: int


class Made(NamedTuple):
    """What a rank has in the end: latents, if it leads, and parameter names."""

    film: Tensor | None
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


def model_under(case: Case, parallel: ParallelConfig, dtype: torch.dtype = torch.float32) -> AvatarDiT:
    """The transformer under a plan."""
    world = World("single", CPU) if parallel.name == "single" else make_world(parallel, parallel.name, CPU)
    return spread_model(case.config, case.weights, Company(world, parallel), lora=Lora({}, 0.0), dtype=dtype)


def made_under(plan: str, parallel: ParallelConfig, weights: str, *, give_up: bool = False) -> Made:
    """A film and a clip under a plan, or the film alone where clips cannot be; maybe after two films given up
    halfway, one of which is closed at once and the other when it is nearly forgotten."""
    case = case_of(plan, weights)
    model = model_under(case, parallel)
    names, world = [name for name, _ in model.named_parameters()], model.company.world
    if not world.leads:
        follow(model, torch.float32)
        return Made(None, None, names)
    late = blocks_of(model, case)
    if give_up:
        next(late)
        with closing(blocks_of(model, case)) as early:
            next(early)
    film = torch.cat(list(blocks_of(model, case)), dim=2)
    late.close()
    clip = None if world.stages > 1 else clip_of(model, case)
    dismiss(model)
    return Made(film, clip, names)


def blocks_of(model: AvatarDiT, case: Case):
    """Latents of one block after the other."""
    sampler = SamplerConfig(name="euler", schedule="linear", sample_steps=2, sample_guide_scale=2.0)
    spans = spans_of(case.blocks, case.config.rollout.block_frames)
    draws = Draws(torch.Generator().manual_seed(0))
    for block in rollout_together(model, case.told, spans, sampler=sampler, draws=draws):
        yield block.latents


def clip_of(model: AvatarDiT, case: Case) -> Tensor:
    """Latents of a clip with full attention."""
    sampler = SamplerConfig(name="unipc", schedule="unipc", sample_steps=2, sample_guide_scale=2.0)
    frames = case.blocks * case.config.rollout.block_frames
    return clip_together(model, case.told, frames, sampler=sampler, generator=torch.Generator().manual_seed(0))


def made_under_all(plans: dict[str, ParallelConfig], weights: str, given_up: Sequence[str] = ()) -> dict[str, Made]:
    """One plan after the other in the same process, so that each must leave a clean place behind."""
    return {plan: made_under(plan, parallel, weights, give_up=plan in given_up) for plan, parallel in plans.items()}


def same_as_single(plans: dict[str, ParallelConfig], ranks: list[dict[str, Made]]) -> None:
    """Films and clips bit for bit, or as near as another order of sums comes where ranks share tokens; and every name."""
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
