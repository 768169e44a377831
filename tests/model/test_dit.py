"""The DiT: the rollout equals its parallel form, and each condition affects what it should and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import BLOCK, SIZE, conditions, tiny_config, tiny_model
from torch import Tensor, nn
from torch.testing import assert_close

from sonic.geometry import BlockSpan
from sonic.model.dit import AvatarDiT
from sonic.model.kv_cache import KVCache
from sonic.types import Conditions


def block_by_block(model: AvatarDiT, latents: Tensor, timestep: Tensor, whole: Conditions, *, first_block: int = 0) -> Tensor:
    cache = model.prefill(whole, model.new_cache(whole, steps=1))
    found = []
    for index in range(latents.shape[2] // BLOCK):
        part = slice(index * BLOCK, (index + 1) * BLOCK)
        span = BlockSpan(first_block + index, (first_block + index) * BLOCK, BLOCK)
        inputs = model.prepare_block(whole.at(BlockSpan(index, index * BLOCK, BLOCK)), span)
        level = timestep if timestep.ndim == 1 else timestep[:, part]
        found.append(model.denoise_block(latents[:, :, part], level, inputs, cache=cache, ring=cache.rings[0]))
    return torch.cat(found, dim=2)


@pytest.mark.parametrize("window_blocks", [1, 2, 5])
@pytest.mark.parametrize("motion", [None, 3])
@pytest.mark.parametrize("first_block", [0, 7])
def test_the_parallel_form_equals_the_rollout_block_by_block(window_blocks, motion, first_block):
    model, whole, latents = tiny_model(window_blocks=window_blocks), conditions(8, batch=2, motion=motion), torch.randn(2, 4, 8, *SIZE)
    timestep = torch.tensor([900.0, 300.0])
    with torch.no_grad():
        parallel = model.forward_blocks(latents, timestep, whole, first_block=first_block)
        rolled = block_by_block(model, latents, timestep, whole, first_block=first_block)
    assert_close(parallel, rolled, atol=1e-5, rtol=1e-5)


def test_each_latent_frame_may_have_its_own_noise_level_in_both_forms():
    model, whole, latents = tiny_model(), conditions(6), torch.randn(1, 4, 6, *SIZE)
    timestep = torch.tensor([[900.0, 10.0, 500.0, 0.0, 1000.0, 1.0]])
    with torch.no_grad():
        assert_close(model.forward_blocks(latents, timestep, whole), block_by_block(model, latents, timestep, whole), atol=1e-5, rtol=1e-5)


def test_one_noise_level_for_all_equals_the_same_level_given_per_frame():
    model, whole, latents = tiny_model(), conditions(4), torch.randn(1, 4, 4, *SIZE)
    with torch.no_grad():
        assert_close(model(latents, torch.tensor([700.0]), whole), model(latents, torch.full((1, 4), 700.0), whole), atol=1e-5, rtol=1e-5)


def test_every_parameter_receives_a_gradient():
    model, whole = tiny_model(), conditions(6, motion=19)
    model.forward_blocks(torch.randn(1, 4, 6, *SIZE), torch.tensor([500.0]), whole).square().sum().backward()
    silent = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.abs().sum() > 0]
    assert not silent


def test_audio_of_one_frame_moves_only_its_block_and_the_following_ones():
    model, whole, latents = tiny_model(window_blocks=2), conditions(8), torch.randn(1, 4, 8, *SIZE)
    louder = Conditions(ref=whole.ref, text=whole.text, audio=whole.audio.clone(), motion=whole.motion, pose=whole.pose)
    louder.audio[..., 4 * BLOCK + 5] += 1  # a frame of block 1
    with torch.no_grad():
        change = model.forward_blocks(latents, torch.tensor([500.0]), louder) - model.forward_blocks(latents, torch.tensor([500.0]), whole)
    moved = change.abs().amax(dim=(0, 1, 3, 4))
    assert (moved[:BLOCK] == 0).all()
    assert moved[BLOCK + 1] > 1e-4


def test_a_block_beyond_the_window_has_no_effect():
    model, whole, latents = tiny_model(window_blocks=1), conditions(4), torch.randn(1, 4, 4, *SIZE)
    other = torch.cat((torch.randn(1, 4, BLOCK, *SIZE), latents[:, :, BLOCK:]), dim=2)
    with torch.no_grad():
        first, second = (model.forward_blocks(x, torch.tensor([500.0]), whole) for x in (latents, other))
    assert_close(first[:, :, BLOCK:], second[:, :, BLOCK:], atol=0, rtol=0)


def test_batch_members_do_not_see_each_other():
    model, whole, latents = tiny_model(), conditions(4, batch=2), torch.randn(2, 4, 4, *SIZE)
    alone = Conditions(ref=whole.ref[1:], text=whole.text[1:], audio=whole.audio[1:], motion=whole.motion[1:], pose=whole.pose[1:])
    with torch.no_grad():
        both = model(latents, torch.tensor([200.0, 800.0]), whole)
        assert_close(both[1:], model(latents[1:], torch.tensor([800.0]), alone), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["audio", "text", "pose", "motion"])
def test_dropping_a_condition_changes_the_prediction(name):
    model, whole, latents = tiny_model(), conditions(4), torch.randn(1, 4, 4, *SIZE)
    with torch.no_grad():
        change = model(latents, torch.tensor([500.0]), whole.drop(name)) - model(latents, torch.tensor([500.0]), whole)
    assert change.abs().max() > 1e-3


def test_no_pose_is_the_same_as_zero_pose():
    model, whole, latents = tiny_model(), conditions(4).drop("pose"), torch.randn(1, 4, 4, *SIZE)
    absent = Conditions(ref=whole.ref, text=whole.text, audio=whole.audio, motion=whole.motion)
    with torch.no_grad():
        assert_close(model(latents, torch.tensor([5.0]), whole), model(latents, torch.tensor([5.0]), absent))


def test_a_ring_stays_finite_and_keeps_its_size_over_many_blocks():
    model, whole = tiny_model(window_blocks=2), conditions(BLOCK)
    cache = model.prefill(whole, model.new_cache(whole, steps=1))
    (ring,) = cache.rings
    sizes = [buffer.shape for buffer in ring.keys.values()]
    with torch.no_grad():
        for index in range(1_000_000, 1_000_007):
            inputs = model.prepare_block(whole, BlockSpan(index, index * BLOCK, BLOCK))
            found = model.denoise_block(torch.randn(1, 4, BLOCK, *SIZE), torch.tensor([500.0]), inputs, cache=cache, ring=ring)
            assert found.isfinite().all()
    assert [buffer.shape for buffer in ring.keys.values()] == sizes


def test_the_rotations_kept_for_a_reference_that_moves_do_not_grow_with_the_blocks():
    model, whole = tiny_model(), conditions(BLOCK)
    cache = model.prefill(whole, model.new_cache(whole, steps=1))
    kept = set()
    with torch.no_grad():
        for index in range(20):
            inputs = model.prepare_block(whole, BlockSpan(index, index * BLOCK, BLOCK))
            model.denoise_block(torch.randn(1, 4, BLOCK, *SIZE), torch.tensor([500.0]), inputs, cache=cache, ring=cache.rings[0])
            kept.add(len(cache.rotations))
    assert model.ref_position(19 * BLOCK) > model.ref_position(10 * BLOCK) > model.ref_position(0)
    assert max(kept) <= len(cache.rings) + 1


def test_a_cache_that_is_prefilled_again_equals_a_new_one():
    model, first, second = tiny_model(), conditions(BLOCK), conditions(BLOCK)
    second = replace(second, ref=torch.randn(1, 4, 1, *SIZE))
    span, latents = BlockSpan(10, 10 * BLOCK, BLOCK), torch.randn(1, 4, BLOCK, *SIZE)

    def denoised(given: Conditions, cache: KVCache) -> Tensor:
        model.prefill(given, cache)
        with torch.no_grad():
            return model.denoise_block(latents, torch.tensor([500.0]), model.prepare_block(given, span), cache=cache, ring=cache.rings[0])

    used = model.new_cache(first, steps=1)
    before = denoised(first, used)  # block 10 moves the reference on
    used.rings[0].rewind()
    again = denoised(second, used)
    assert_close(again, denoised(second, model.new_cache(second, steps=1)), atol=0, rtol=0)
    assert not torch.equal(again, before)


def test_a_rollout_far_from_the_start_equals_one_near_it():
    """Only differences of positions matter, and the reference position moves with the block."""
    model, whole, latents = tiny_model(), conditions(4, motion=None), torch.randn(1, 4, 4, *SIZE)
    timestep = torch.tensor([400.0])
    with torch.no_grad():
        near, far = (model.forward_blocks(latents, timestep, whole, first_block=first) for first in (40, 1_000_000))
    assert_close(near, far, atol=1e-4, rtol=1e-4)


def test_blocks_must_be_written_in_order():
    model, whole = tiny_model(), conditions(BLOCK)
    cache = model.prefill(whole, model.new_cache(whole, steps=1))
    latents, level = torch.randn(1, 4, BLOCK, *SIZE), torch.tensor([500.0])
    model.denoise_block(latents, level, model.prepare_block(whole, BlockSpan(0, 0, BLOCK)), cache=cache, ring=cache.rings[0])
    late = model.prepare_block(whole, BlockSpan(2, 2 * BLOCK, BLOCK))
    with pytest.raises(ValueError, match="block 2 cannot follow block 0"):
        model.denoise_block(latents, level, late, cache=cache, ring=cache.rings[0])


def test_bfloat16_weights_predict_nearly_the_same():
    model, whole, latents = tiny_model(), conditions(4), torch.randn(1, 4, 4, *SIZE)
    with torch.no_grad():
        exact = model.forward_blocks(latents, torch.tensor([500.0]), whole)
        rounded = model.to(torch.bfloat16).forward_blocks(latents, torch.tensor([500.0]), whole)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() < 0.05 * exact.norm()


def test_a_new_model_predicts_zero_and_still_learns():
    torch.manual_seed(0)
    model, whole, latents = AvatarDiT(tiny_config()), conditions(4), torch.randn(1, 4, 4, *SIZE)
    found = model.forward_blocks(latents, torch.tensor([500.0]), whole)
    assert found.abs().max() == 0
    (found - 1).square().sum().backward()
    assert isinstance(model.head.project, nn.Linear) and model.head.project.weight.grad.abs().sum() > 0
