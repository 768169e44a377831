"""Laws that every plan obeys: the film of one rank, the names of one rank, and no more memory than its share."""

from __future__ import annotations

from contextlib import closing

import pytest
import torch
from ranks import on_ranks
from tiny import conditions, film, spans_of, tiny_config, tiny_model
from torch.testing import assert_close

from sonic.config import ModelConfig, SamplerConfig
from sonic.infer.ranks import dismiss, follow, rollout_together
from sonic.infer.rollout import Draws
from sonic.model.dit import AvatarDiT
from sonic.model.weights import save_weights
from sonic.parallel.load import Lora
from sonic.parallel.mesh import make_world
from sonic.parallel.settings import ParallelConfig
from sonic.parallel.spread import PLANS, Company, spread_model
from sonic.types import Conditions

BLOCKS = 3
CPU = torch.device("cpu")
EXACT = {
    "fsdp block": ParallelConfig("fsdp", unshard_unit="block", prefetch=0),
    "fsdp sublayer": ParallelConfig("fsdp", unshard_unit="sublayer", prefetch=2),
    "fsdp linear": ParallelConfig("fsdp", unshard_unit="linear", prefetch=1),
    "fsdp on the host": ParallelConfig("fsdp", cpu_offload=True),
    "fsdp kept": ParallelConfig("fsdp", reshard=False),
    "hsdp": ParallelConfig("fsdp", replicas=2),
    "pipeline": ParallelConfig("pipeline"),
    "offload": ParallelConfig("offload", replicas=-1),
}
CLOSE = {
    "context": ParallelConfig("context"),
    "fsdp and context": ParallelConfig("fsdp", context=2),
    "pipeline and context": ParallelConfig("pipeline", context=2),
}


def model_under(config: ModelConfig, weights: str, parallel: ParallelConfig) -> AvatarDiT:
    """The transformer under a plan."""
    company = Company(make_world(parallel, parallel.name, CPU), parallel)
    return spread_model(config, weights, company, lora=Lora({}, 0.0), dtype=torch.float32)


def film_under(model: AvatarDiT, told: Conditions, **changes) -> torch.Tensor | None:
    """All latents of a film, on the rank that leads; made twice, the first time only half looked at."""
    sampler = SamplerConfig(**{"name": "euler", "schedule": "linear", "sample_steps": 3, **changes})
    if not model.company.world.leads:
        follow(model, torch.float32)
        return None
    seeded = lambda: Draws(torch.Generator().manual_seed(0))  # noqa: E731
    spans = spans_of(BLOCKS, model.config.rollout.block_frames)
    with closing(rollout_together(model, told, spans, sampler=sampler, draws=seeded())) as given_up:
        next(given_up)
    latents = torch.cat([block.latents for block in rollout_together(model, told, spans, sampler=sampler, draws=seeded())], dim=2)
    dismiss(model)
    return latents


def films_under(plans: dict[str, ParallelConfig], weights: str) -> dict[str, tuple[torch.Tensor | None, list[str]]]:
    """Film and parameter names under each plan."""
    found = {}
    for plan, parallel in plans.items():
        model = model_under(tiny_config(), weights, parallel)
        names = [name for name, _ in model.named_parameters()]
        found[plan] = film_under(model, conditions(2 * BLOCKS), sample_guide_scale=2.0), names
    return found


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_weights(tiny_model(), path)
    return str(path)


@pytest.fixture(scope="module")
def alone() -> torch.Tensor:
    return film(tiny_model(), conditions(2 * BLOCKS), BLOCKS, sample_steps=3, sample_guide_scale=2.0)


@pytest.mark.parametrize("count", [2, 4])
def test_every_plan_makes_the_film_of_one_rank(count, weights, alone):
    ranks = on_ranks(count, films_under, EXACT | CLOSE, weights)
    assert {plan.name for plan in (EXACT | CLOSE).values()} == set(PLANS) - {"single"}
    for name, (latents, _) in ranks[0].items():
        if name in EXACT:
            assert torch.equal(latents, alone), name
        else:
            assert_close(latents, alone, atol=1e-5 * alone.abs().max().item(), rtol=0)
    whole = {name for name, _ in tiny_model().named_parameters()}
    for name in EXACT | CLOSE:
        assert set().union(*(rank[name][1] for rank in ranks)) == whole, name
