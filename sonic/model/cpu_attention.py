"""Attention by plain products: what a CPU with bfloat16 dot products, but no matrix unit (AMX), does faster than torch's kernel."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

SCORES = 1 << 22  # that are held at once, 8 MiB: few enough to stay in a cache until they are weights


@cache
def products_are_faster() -> bool:
    """Whether this CPU multiplies bfloat16 matrices itself while torch's attention multiplies them at the rate of float32."""
    able = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 cannot tell yet
    return bool(able.get("avx512_bf16")) and not able.get("amx_bf16")


def by_products(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Softmax attention without gradients; scores are rounded to the dtype of the queries.  [B,N,heads,d] -> [B,N,heads,d]

    As many heads, or else as many queries of one, are done at once as SCORES allows.
    """
    batch, number, heads, dim = queries.shape
    queries, keys, values = (rows.transpose(1, 2).flatten(0, 1) for rows in (queries, keys, values))  # [B·heads,N,d]
    attn_out, length = torch.empty_like(queries), keys.shape[1]
    alike, rows = max(1, SCORES // (number * length)), max(1, SCORES // length)
    room = queries.new_empty(min(alike, batch * heads) * min(rows, number) * length)
    for first in range(0, batch * heads, alike):
        some = slice(first, first + alike)
        for query, out in zip(queries[some].split(rows, dim=1), attn_out[some].split(rows, dim=1), strict=True):
            scores = room[: query.shape[0] * query.shape[1] * length].view(*query.shape[:2], length)
            torch.baddbmm(scores, query, keys[some].mT, beta=0, alpha=dim**-0.5, out=scores)
            torch.bmm(torch.softmax(scores, dim=-1, out=scores), values[some], out=out)
    return attn_out.unflatten(0, (batch, heads)).transpose(1, 2)
