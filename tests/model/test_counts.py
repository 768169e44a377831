"""Parameters and multiply-adds counted from the config equal those of the modules on the meta device."""

from __future__ import annotations

import pytest
import torch

from sonic.cli import Entry, compose, group_choices
from sonic.model import counts
from sonic.model.dit import AvatarDiT
from sonic.model.embed import motion_positions
from sonic.parallel.parallel_config import PlanConfig
from sonic.parallel.shard_units import UNITS, WHOLE, all_units

PLAN = Entry("plan", PlanConfig)


def model_of(name):
    config = compose(PLAN, [f"model={name}"]).model
    with torch.device("meta"):
        return config, AvatarDiT(config)


def numbers(module):
    return sum(weight.numel() for weight in module.parameters())


@pytest.mark.parametrize("name", group_choices("model"))
def test_every_part_of_a_model_is_counted(name):
    config, model = model_of(name)
    assert counts.weights(config) == numbers(model)
    ends = {part: numbers(module) for part, module in model.named_children() if part not in ("blocks", "audio_injectors")}
    assert {part: size for part, size in counts.end_weights(config).items() if size} == ends
    block = model.blocks[0]
    parts = {part: numbers(getattr(block, part)) for part in ("self_attention", "text_attention", "mlp_in", "mlp_out")}
    assert counts.block_weights(config) == parts | {"rest": numbers(block) - sum(parts.values())}
    injector = {part: numbers(module) for part, module in model.audio_injectors[0].named_children()}
    assert counts.injector_weights(config) == injector


@pytest.mark.parametrize("unshard_unit", UNITS)
@pytest.mark.parametrize("name", group_choices("model"))
def test_units_name_modules_and_their_sizes(name, unshard_unit):
    config, model = model_of(name)
    seen = set()
    for unit in all_units(config, unshard_unit):
        held = {weight for module in unit.modules for weight in model.get_submodule(module).parameters()}
        assert sum(weight.numel() for weight in held) == unit.numbers, unit.modules
        assert not held & seen
        seen |= held
    whole = sum(numbers(model.get_submodule(name)) for name in WHOLE)
    left = numbers(model) - whole - sum(weight.numel() for weight in seen)
    assert left < 0.03 * numbers(model)


MULTIPLY_ADDS = {  # (clip of 20 latent frames, block with four in its ring), from an independent count
    ("live_avatar_14b", False): (485_672_092_303_360, 58_356_203_520_000),
    ("live_avatar_14b", True): (534_749_192_519_680, 60_411_622_195_200),
    ("preview", False): (1_208_674_854_912, 110_956_486_656),
    ("preview", True): (1_208_674_854_912, 110_956_486_656),
    ("wan_s2v_14b", False): (485_672_092_303_360, 58_356_203_520_000),
    ("wan_s2v_14b", True): (534_749_192_519_680, 60_411_622_195_200),
}


@pytest.mark.parametrize(("name", "motion"), MULTIPLY_ADDS)
def test_multiply_adds_equal_an_independent_count(name, motion):
    config, _ = model_of(name)
    clip, block = MULTIPLY_ADDS[name, motion]
    motion = motion and bool(config.motion.buckets)
    grid = (24, 44)
    past = len(motion_positions(config.motion.buckets, *grid)[0]) if motion else 0
    assert counts.memory_tokens(config, grid, motion=motion) == grid[0] * grid[1] + past
    assert counts.forward_multiply_adds(config, 20, grid, motion=motion) == clip
    assert counts.block_multiply_adds(config, grid, blocks=4, motion=motion) == block


def test_every_model_is_counted():
    others = {"preview_velocity", "sonic_svd"}  # one has the sizes of preview, the other a UNet: test_unet_counts.py
    assert {name for name, _ in MULTIPLY_ADDS} == set(group_choices("model")) - others
