"""Attention by matrix products: faster than torch's kernel on a CPU with bfloat16 dot products but without a matrix unit (AMX)."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

SCORES = 1 << 22  # attention scores computed at a time, 8 MiB: few enough to stay in the CPU's cache through the softmax


@cache
def products_are_faster() -> bool:
    """Whether this CPU has bfloat16 products that torch's attention does not use, so that it runs at the rate of float32."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 does not have it yet
    return bool(capabilities.get("avx512_bf16")) and not capabilities.get("amx_bf16")


def by_products(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Softmax attention without gradients; scores are rounded to the dtype of the queries.  [B,N,heads,d] -> [B,N,heads,d]

    It computes as many heads at a time as SCORES allows, or else as many queries of one head.
    """
    batch, number, heads, dim = queries.shape
    queries, keys, values = (rows.transpose(1, 2).flatten(0, 1) for rows in (queries, keys, values))  # [B·heads,N,d]
    attn_out, length = torch.empty_like(queries), keys.shape[1]
    heads_at_once, rows = max(1, SCORES // (number * length)), max(1, SCORES // length)
    buffer = queries.new_empty(min(heads_at_once, batch * heads) * min(rows, number) * length)
    for first in range(0, batch * heads, heads_at_once):
        part = slice(first, first + heads_at_once)
        for query, out in zip(queries[part].split(rows, dim=1), attn_out[part].split(rows, dim=1), strict=True):
            scores = buffer[: query.shape[0] * query.shape[1] * length].view(*query.shape[:2], length)
            torch.baddbmm(scores, query, keys[part].mT, beta=0, alpha=dim**-0.5, out=scores)
            torch.bmm(torch.softmax(scores, dim=-1, out=scores), values[part], out=out)
    return attn_out.unflatten(0, (batch, heads)).transpose(1, 2)
