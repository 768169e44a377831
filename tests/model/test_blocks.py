"""The parts of a block: every optimised form equals the plain computation."""

from __future__ import annotations

import pytest
import torch
from tiny import SIZE, conditions, tiny_model
from torch.testing import assert_close

from sonic.model.attention import sdpa
from sonic.model.blocks import add_gated, add_residual, modulate, set_attention


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
        assert_close(add_residual(tokens, change.clone()), tokens + change.float())
        assert_close(add_gated(tokens, change.clone(), [gate], layout=((2, 3),)), by_hand)


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
