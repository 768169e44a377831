"""Attention by matrix products: equal to softmax attention for every chunk size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from sonic.model import attention, cpu
from sonic.model.cpu import attention_by_products


def softmax_attention(*rows: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(*(each.transpose(1, 2) for each in rows)).transpose(1, 2)


@pytest.fixture
def rows(rng):
    return [torch.randn(2, length, 6, 8) for length in (10, 7, 7)]


@pytest.mark.parametrize("scores", [1, 7, 30, 70, 200, 1 << 22])
def test_it_is_softmax_attention_however_few_scores_are_held(scores, rows, monkeypatch):
    """One row at a time, some rows of a head, a head, some heads, all."""
    monkeypatch.setattr(cpu, "SCORES", scores)
    assert_close(attention_by_products(*rows), softmax_attention(*rows), atol=1e-5, rtol=1e-5)


def test_in_bfloat16_it_is_as_near_as_its_scores_are_rounded(rows):
    narrow = [each.bfloat16() for each in rows]
    found, exact = attention_by_products(*narrow).float(), softmax_attention(*(each.float() for each in narrow))
    assert (found - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize(("able", "chosen"), [({"avx512_bf16": True}, True), ({"avx512_bf16": True, "amx_bf16": True}, False), ({}, False)])
def test_attention_by_products_is_chosen_where_it_is_faster(able, chosen, rows, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    monkeypatch.setattr(attention, "attention_by_products", lambda *given: "by products")
    cpu.products_are_faster.cache_clear()
    try:
        narrow = [each.bfloat16() for each in rows]
        assert (not torch.is_tensor(attention.sdpa(*narrow))) is chosen
        assert torch.is_tensor(attention.sdpa(*rows)), "float32 stays with torch's kernel"
        for learning in range(3):  # the queries, the keys or the values alone
            given = [each.clone().requires_grad_(index == learning) for index, each in enumerate(narrow)]
            found = attention.sdpa(*given)
            assert torch.is_tensor(found) and found.requires_grad
    finally:
        cpu.products_are_faster.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("queries", "heads"), [(0, 6), (10, 0)])
def test_a_rank_without_tokens_or_without_heads_attends_to_nothing(queries, heads, dtype, monkeypatch):
    monkeypatch.setattr(attention, "products_are_faster", lambda: True)
    rows = [torch.randn(2, length, heads, 8).to(dtype) for length in (queries, 7, 7)]
    assert attention.sdpa(*rows).shape == (2, queries, heads, 8)
