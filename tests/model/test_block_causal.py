"""One flex attention per layer is the block-causal attention of a training pass, with its gradients."""

from __future__ import annotations

import pytest
import torch
from tiny import SIZE, conditions, tiny_model
from torch.nn.attention import flex_attention
from torch.testing import assert_close

from sonic.model import block_causal
from sonic.model.attention import sdpa
from sonic.model.blocks import set_attention
from sonic.model.execution import Execution

FLEX = Execution(flex_blocks=True)


@pytest.fixture
def with_gradients(monkeypatch):
    """torch refuses gradients on a CPU, where its plain implementation has them."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *rows: None)
    monkeypatch.setattr(block_causal, "has_gradients", lambda device: True)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("window", "first_block", "motion"), [(1, 0, 3), (2, 0, None), (2, 40, 3), (9, 1, 3)])
def test_one_attention_is_the_attention_of_every_block(window, first_block, motion, with_gradients):
    model, whole = tiny_model(window_blocks=window, ref_distance=2), conditions(8, motion=motion)
    latents, timestep = torch.randn(1, 4, 8, *SIZE), torch.linspace(100, 900, 8)[None]
    direction, found = torch.randn_like(latents), []
    for execution in (Execution(), FLEX):
        model.zero_grad()
        prediction = model.forward_blocks(latents, timestep, whole, first_block=first_block, execution=execution)
        (prediction * direction).sum().backward()
        found.append([prediction.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for plain, at_once in zip(*found, strict=True):
        assert_close(at_once, plain, rtol=1e-4, atol=1e-5 * float(plain.abs().max()) + 1e-6)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_pass_is_one_attention_per_layer_and_one_mask_per_shape(monkeypatch):
    model, whole, masks = tiny_model(), conditions(6), []
    loops, real = [], block_causal.flex_here
    counted = lambda like, **how: lambda *rows, block_mask: count(real(like, **how), rows, block_mask)  # noqa: E731
    monkeypatch.setattr(block_causal, "flex_here", counted)
    set_attention(model, lambda *rows: loops.append(rows[0].shape[1]) or sdpa(*rows))

    def count(attend, rows, mask):
        masks.append(mask)
        return attend(*rows, block_mask=mask)

    with torch.no_grad():
        for first_block in (0, 50):
            model.forward_blocks(torch.randn(1, 4, 6, *SIZE), torch.tensor([500.0]), whole, first_block=first_block, execution=FLEX)
    layers, injectors = len(model.blocks), len(model.audio_injectors)
    assert len(masks) == 2 * layers and len(set(map(id, masks))) == 1
    assert len(loops) == 2 * (layers + injectors)  # to the prompt and to the audio


def test_without_gradients_on_this_device_blocks_attend_one_by_one(caplog):
    model, whole = tiny_model(), conditions(4)
    latents, timestep = torch.randn(1, 4, 4, *SIZE), torch.tensor([500.0])
    block_causal.has_gradients.cache_clear()
    assert torch.equal(*(model.forward_blocks(latents, timestep, whole, execution=each) for each in (Execution(), FLEX)))
    assert caplog.text.count("has no gradients on a CPU") == 1
