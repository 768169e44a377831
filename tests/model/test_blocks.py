"""The parts of a block: every optimised form equals the plain computation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import SIZE, conditions, conditions_for, tiny_model
from torch.testing import assert_close

from sonic.cli import compose
from sonic.commands.infer_command import ENTRY as INFER
from sonic.geometry import BlockSpan
from sonic.model.attention import sdpa
from sonic.model.blocks import add_gated, add_residual, modulate, set_attention
from sonic.model.dit import AvatarDiT


def test_every_attention_of_a_model_uses_the_chosen_kernel():
    model, seen = tiny_model(), []

    def counting(*rows):
        seen.append(1)
        return sdpa(*rows)

    set_attention(model, counting)
    cond = conditions(2)
    with torch.no_grad():
        model(torch.randn(1, 4, 2, *SIZE), torch.full((1,), 500.0), cond)
    assert len(seen) == 2 * 3 + 2  # self and text in three layers, audio in two


def test_one_level_for_all_is_modulated_like_the_same_level_per_frame(rng):
    x, (shift, scale) = torch.randn(2, 3, 5, 8), torch.randn(2, 1, 1, 1, 8)
    per_frame = modulate(x, shift.expand(2, 3, 1, 8), scale.expand(2, 3, 1, 8), eps=1e-6)
    assert_close(modulate(x, shift, scale, eps=1e-6), per_frame, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("learns", [True, False])
def test_a_change_in_bfloat16_leaves_float32_tokens_in_float32(learns, rng):
    tokens, change, gate = torch.randn(1, 6, 8), torch.randn(1, 6, 8).bfloat16(), torch.randn(1, 2, 1, 8)
    by_hand = tokens + (gate * change.float().view(1, 2, 3, 8)).flatten(1, 2)
    with torch.set_grad_enabled(learns):
        assert_close(add_residual(tokens.clone(), change), tokens + change.float(), atol=0, rtol=0)
        assert_close(add_residual(tokens.clone(), change[:, :4]), torch.cat((tokens[:, :4] + change[:, :4].float(), tokens[:, 4:]), dim=1))
        assert_close(add_gated(tokens.clone(), change, [gate], layout=((2, 3),)), by_hand)


def test_under_autocast_the_tokens_stay_float32_with_and_without_gradients():
    model, cond, latents = tiny_model(), conditions(2), torch.randn(1, 4, 2, *SIZE)
    dtypes, found = set(), []
    for block in model.blocks:
        block.register_forward_hook(lambda block, given, tokens: dtypes.add(tokens.dtype))
    for learns in (True, False):
        with torch.set_grad_enabled(learns), torch.autocast("cpu", torch.bfloat16):
            found.append(model(latents, torch.tensor([500.0]), cond).detach())
    assert dtypes == {torch.float32}
    assert (found[0] - found[1]).norm() < 0.02 * found[0].norm()  # bfloat16 rounds by 0.004


@torch.no_grad()
def test_forty_layers_in_bfloat16_are_within_a_hundredth_of_float32():
    """With tokens and modulation in bfloat16 the error would be 1.8 %; in float32 the rounding of products remains."""
    torch.manual_seed(0)
    config = compose(INFER, ["model=wan_s2v_14b"]).model
    config = replace(
        config,
        trunk=replace(config.trunk, hidden_dim=384, ffn_dim=1024, num_heads=3),
        audio=replace(config.audio, inject_layers=[0, 4, 8], audio_dim=64, num_audio_layers=3),
        text=replace(config.text, text_dim=64, text_len=16),
        motion=replace(config.motion, buckets=[]),
    )
    model, given = AvatarDiT(config).bfloat16().eval(), conditions_for(config, 4, SIZE).to(dtype=torch.bfloat16)
    torch.nn.init.normal_(model.head.project.weight, std=0.05)
    latents, timestep = torch.randn(1, 16, 4, *SIZE), torch.tensor([602.0])
    found = model(latents, timestep, given)
    exact = model.float()(latents, timestep, given.to(dtype=torch.float32))
    assert config.trunk.num_layers == 40
    assert (found - exact).norm() < 0.008 * exact.norm()


@pytest.mark.parametrize("way", ["forward", "forward_blocks", "denoise_block"])
def test_the_tokens_of_a_bfloat16_model_are_float32_in_every_layer(way):
    model, given, latents = tiny_model().bfloat16(), conditions(2).to(dtype=torch.bfloat16), torch.randn(1, 4, 2, *SIZE)
    dtypes = []
    for layer in (*model.blocks, model.head):
        layer.register_forward_pre_hook(lambda layer, given: dtypes.append(given[0].dtype))
    with torch.no_grad():
        if way == "denoise_block":
            cache = model.prefill(given, model.new_cache(given, steps=1))
            inputs = model.prepare_block(given, BlockSpan(0, 0, 2))
            model.denoise_block(latents, torch.tensor([500.0]), inputs, cache=cache, ring=cache.rings[0])
        else:
            getattr(model, way)(latents, torch.tensor([500.0]), given)
    assert set(dtypes) == {torch.float32} and len(dtypes) == 3 * (1 + (way == "denoise_block")) + 1
