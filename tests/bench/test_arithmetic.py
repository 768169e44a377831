"""The counted multiply-adds equal torch's own count."""

from __future__ import annotations

from itertools import accumulate, chain, repeat
from types import SimpleNamespace

import pytest
import torch
from tiny import BLOCK, SIZE, conditions, tiny_config, tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sonic.bench import arithmetic
from sonic.bench.arithmetic import gemm_fraction
from sonic.model.counts import block_multiply_adds, forward_multiply_adds
from sonic.types import BlockSpan

GRID = (SIZE[0] // 4, SIZE[1] // 4)


def counted(run) -> int:
    """Multiply-adds by torch's own counter, on kernels that it knows."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.backends.mkldnn.flags(enabled=False):
        run()
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("motion", [None, 3])
def test_the_count_of_a_forward_is_what_torch_counts(motion):
    model, given = tiny_model(), conditions(6, motion=motion)
    found = counted(lambda: model(torch.randn(1, 4, 6, *SIZE), torch.tensor([500.0]), given))
    assert forward_multiply_adds(model.config, 6, GRID, motion=motion is not None) == found


@pytest.mark.parametrize("blocks", [1, 2])
def test_the_count_of_a_block_is_what_torch_counts(blocks):
    model, given = tiny_model(window_blocks=2).requires_grad_(False), conditions(BLOCK, motion=None)
    cache = model.prefill(given, model.new_cache(given, steps=1))
    latents, level = torch.randn(1, 4, BLOCK, *SIZE), torch.tensor([500.0])
    for index in range(blocks):
        inputs = model.prepare_block(given, BlockSpan(index, index * BLOCK, BLOCK))
        found = counted(lambda inputs=inputs: model.denoise_block(latents, level, inputs, cache=cache, ring=cache.rings[0]))
    assert block_multiply_adds(model.config, GRID, blocks=blocks) == found


def test_the_share_of_a_matrix_product_is_that_of_the_best_rates(monkeypatch):
    """By a clock in which all work takes a second, and the first forward five."""
    config = tiny_config()
    clock = accumulate(chain([0, 1, 5], repeat(1)))
    monkeypatch.setattr(arithmetic, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    share = gemm_fraction(config, torch.float32, latent_frames=3, side=SIZE[0], repeats=2)
    assert share == pytest.approx(forward_multiply_adds(config, 3, GRID) / 2048**3)
