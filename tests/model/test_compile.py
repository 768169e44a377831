"""Compiled regions: as the code that they are compiled from, under every plan, and compiled once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from tiny import conditions, latents_of, tiny_model
from torch.testing import assert_close

from sonic.families.family import build_components
from sonic.config import RunConfig
from sonic.inference.components import Components
from sonic.inference.distributed_rollout import worker_loop, shutdown
from sonic.inference.report import StageTimer
from sonic.model.compile import COMPILE_TIME, compiled_regions, region
from sonic.model.dit import AvatarDiT
from sonic.model.embed import grid_positions, rotate, rotate_both, rotation
from sonic.parallel.context import DistributedContext
from sonic.parallel.mesh import World

BLOCKS = 4  # two more than the ring of the tiny model holds


def compiled_model(**settings) -> AvatarDiT:
    model = tiny_model(**settings).requires_grad_(False)
    model.compiled = True
    return model


def test_compiled_blocks_equal_plain_ones_and_nothing_is_compiled_after_the_first():
    plain = latents_of(tiny_model(), conditions(8), BLOCKS)
    model, before = compiled_model(), COMPILE_TIME.number
    latents_of(model, conditions(2), 1)
    after_one = COMPILE_TIME.number
    assert after_one - before <= 8  # four regions of a block, three of an injector, the rotation, for all layers and steps
    assert_close(latents_of(model, conditions(8), BLOCKS), plain, atol=1e-5, rtol=1e-5)
    assert COMPILE_TIME.number == after_one


def test_a_compiled_clip_equals_a_plain_one():
    latents, timestep, given = torch.randn(1, 4, 2, 16, 16), torch.tensor([400.0]), conditions(2)
    with torch.no_grad():
        plain, found = (model(latents, timestep, given) for model in (tiny_model(), compiled_model()))
    assert_close(found, plain, atol=1e-5, rtol=1e-5)
