"""Laws that every plan obeys: the film of one rank, the clip of one rank, and the names of one rank."""

from __future__ import annotations

from contextlib import closing
from typing import NamedTuple

import pytest
import torch
from ranks import on_ranks
from tiny import conditions, conditions_for, spans_of, tiny_config, tiny_model
from torch import Tensor

from sonic.app import Entry, compose
from sonic.config import ModelConfig, SamplerConfig
from sonic.infer.build import weight_files
from sonic.infer.ranks import clip_together, dismiss, follow, rollout_together
from sonic.infer.rollout import Draws
from sonic.model.dit import AvatarDiT
from sonic.model.weights import save_weights
from sonic.parallel.load import Lora
from sonic.parallel.mesh import World, make_world
from sonic.parallel.settings import ParallelConfig, PlanConfig
from sonic.parallel.spread import PLANS, Company, spread_model
from sonic.types import Conditions

CPU = torch.device("cpu")
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
GIVEN_UP = ("fsdp kept", "pipeline", "context", "pipeline and context")  # after a film that nobody saw the end of
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


def made_under(plan: str, parallel: ParallelConfig, weights: str) -> Made:
    """A film and a clip under a plan, or the film alone where clips cannot be."""
    case = case_of(plan, weights)
    world = World("single", CPU) if parallel.name == "single" else make_world(parallel, parallel.name, CPU)
    model = spread_model(case.config, case.weights, Company(world, parallel), lora=Lora({}, 0.0), dtype=torch.float32)
    names = [name for name, _ in model.named_parameters()]
    if not world.leads:
        follow(model, torch.float32)
        return Made(None, None, names)
    if plan in GIVEN_UP:
        with closing(blocks_of(model, case)) as given_up:
            next(given_up)
    film = torch.cat(list(blocks_of(model, case)), dim=2)
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


def made_under_all(plans: dict[str, ParallelConfig], weights: str) -> dict[str, Made]:
    """One plan after the other in the same process, so that each must leave a clean place behind."""
    return {plan: made_under(plan, parallel, weights) for plan, parallel in plans.items()}


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_weights(tiny_model(), path)
    return str(path)


@pytest.mark.parametrize("count", [2, 4])
def test_every_plan_makes_the_film_and_the_clip_of_one_rank(count, weights):
    plans = TINY | PREVIEW
    ranks = on_ranks(count, made_under_all, SINGLE | plans, weights, timeout_s=120)
    assert {plan.name for plan in plans.values()} == set(PLANS) - {"single", "zero3"}
    for plan, parallel in plans.items():
        first, single = ranks[0][plan], ranks[0]["preview" if plan in PREVIEW else "tiny"]
        assert {name for rank in ranks for name in rank[plan].names} == set(single.names), plan
        assert (first.clip is None) == (parallel.name == "pipeline" and count // parallel.context > 1), plan
        close = parallel.name == "context" or parallel.context > 1
        for made, wanted in zip(first[:2], single[:2], strict=True):
            if made is not None:
                wrong = (made - wanted).abs().max() / wanted.abs().max()
                assert wrong <= (1e-5 if close else 0), f"{plan}: off by {wrong:.1e}"


def refused_clip(weights: str) -> str:
    """What the first rank of a pipeline says to a clip."""
    case, parallel = case_of("tiny", weights), ParallelConfig("pipeline")
    world = make_world(parallel, parallel.name, CPU)
    model = spread_model(case.config, weights, Company(world, parallel), lora=Lora({}, 0.0), dtype=torch.float32)
    if not world.leads:
        follow(model, torch.float32)
        return ""
    with pytest.raises(ValueError) as refused:
        clip_of(model, case)
    dismiss(model)
    return str(refused.value)


def test_a_pipeline_refuses_clips_with_the_plan_that_makes_them(weights):
    said, _ = on_ranks(2, refused_clip, weights, timeout_s=60)
    assert "use parallel=fsdp" in said
