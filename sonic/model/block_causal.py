"""A whole rollout in one training pass with one attention per layer, by torch's flex_attention with a mask of blocks."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from sonic.model.attention import QKV, Attention, BlockCausalContext, flex_here
from sonic.model.embed import rotate

log = logging.getLogger("sonic.model")


@dataclass(frozen=True)
class FlexBlockContext(BlockCausalContext):
    """The same attention as BlockCausalContext's, in one call instead of one per block.

    The grid's keys are followed by a copy of the memory's keys for each block, and by one for the memory itself, each rotated for its
    reader. So the shapes, and with them the mask and the compiled kernel, depend on the sizes alone.
    """

    def attend(self, attention: Attention, tokens: QKV) -> Tensor:
        """One masked attention; on a CPU one per block where gradients are needed, which torch lacks there.  -> [B,N,heads,d]"""
        if not tokens.queries.numel():  # a rank to which no head of this attention is assigned
            return tokens.queries
        if any(rows.requires_grad for rows in tokens) and not has_gradients(tokens.queries.device):
            return super().attend(attention, tokens)
        size, copies = self.grid.shape[0], len(self.memory_keys) + 1
        queries = rotate(tokens.queries, torch.cat((self.grid, self.memory)))
        keys, values = (torch.cat((rows[:, :size], rows[:, size:].repeat(1, copies, 1, 1)), dim=1) for rows in (tokens.keys, tokens.values))
        mask = block_mask(size, tokens.queries.shape[1] - size, copies - 1, window=self.window, device=queries.device)
        rows = (each.transpose(1, 2) for each in (queries, rotate(keys, torch.cat((self.grid, *self.memory_keys, self.memory))), values))
        return flex_here(queries, dynamic=False)(*rows, block_mask=mask).transpose(1, 2)


@lru_cache(maxsize=8)
def block_mask(grid: int, memory: int, blocks: int, *, window: int, device: torch.device) -> BlockMask:
    """The mask for `grid` tokens of `blocks` blocks and `memory` tokens: each key has a first and a last block that attends to it.

    The memory counts as one more block. Made once per shape, because making it needs a byte for every pair of a query and a key.
    """
    block = torch.arange(blocks, device=device).repeat_interleave(grid // blocks)
    copy = torch.arange(blocks + 1, device=device).repeat_interleave(memory)
    reader = torch.cat((block, torch.full((memory,), blocks, device=device)))
    first, last = torch.cat((block, copy)), torch.cat(((block + window - 1).clamp(max=blocks - 1), copy))
    visible = lambda batch, head, query, key: (first[key] <= reader[query]) & (reader[query] <= last[key])  # noqa: E731
    return create_block_mask(visible, None, None, len(reader), len(first), device=device)


@cache
def has_gradients(device: torch.device) -> bool:
    """Whether flex_attention has gradients on a device; a warning where it has not."""
    if device.type == "cpu":
        log.warning("flex_attention has no gradients on a CPU, so that every block has an attention of its own")
    return device.type != "cpu"
