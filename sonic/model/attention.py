"""Attention kernels, and which tokens attend to which. Shapes: N tokens of a packed sequence, d channels of a head. No weights."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sonic.model.cpu import attention_by_products, products_are_faster, slow_here
from sonic.model.embed import Rotation, rotate, rotate_both
from sonic.types import pick

log = logging.getLogger("sonic.model")

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v [B,N,heads,d] -> [B,N,heads,d]
KeysValues = tuple[Tensor, Tensor]


def sdpa(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Softmax attention by torch, without a mask.  [B,N,heads,d] -> [B,N,heads,d]"""
    if not queries.numel():  # a rank to which no head of this attention is assigned
        return queries
    slow, learning = slow_here(queries), any(rows.requires_grad for rows in (queries, keys, values))
    if slow and not learning and products_are_faster():
        return attention_by_products(queries, keys, values)
    queries, keys, values = (x.transpose(1, 2) for x in (queries, keys, values))
    if slow and learning:  # backward through torch's CPU kernel takes longer in bfloat16 than through plain products
        scores = (queries * queries.shape[-1] ** -0.5) @ keys.mT
        return (scores.softmax(-1) @ values).transpose(1, 2)
    return F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2)


def xformers(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Softmax attention by the CUDA kernels of xformers, without a mask.  [B,N,heads,d] -> [B,N,heads,d]"""
    if not queries.numel():
        return queries
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(queries, keys, values)


ATTENTION: dict[str, Attention] = {"sdpa": sdpa, "xformers": xformers}


def attention_for(name: str, device: torch.device) -> Attention:
    """The attention function called `name` (run.attention); torch's, with a warning, where the device cannot run it.

    Raises ValueError when the package that it needs is not installed.
    """
    if name == "xformers" and device.type != "cuda":
        log.warning("run.attention=xformers has kernels for CUDA only; on %s torch's own attention is used (sdpa)", device.type)
        return sdpa
    if name == "xformers" and find_spec("xformers") is None:
        raise ValueError("run.attention=xformers needs the package xformers: pip install xformers; run.attention=sdpa needs nothing")
    return pick(ATTENTION, name, "run.attention")


class QKV(NamedTuple):
    """Queries, keys and values of all tokens, each [B,N,heads,d], before rotary positions are applied."""

    queries: Tensor
    keys: Tensor
    values: Tensor


class AttentionContext(ABC):
    """Which keys the tokens of one layer attend to, and the rotary positions of both."""

    @abstractmethod
    def attend(self, attention: Attention, tokens: QKV) -> Tensor:
        """Self-attention over the allowed keys.  -> [B,N,heads,d]"""

    def text(self, project: Callable[[Tensor], KeysValues], rows: Tensor | None) -> KeysValues:
        """Keys and values [B,L,heads,d] of the prompt: projected from its rows [B,L,D], or by subclasses taken from a cache."""
        return project(rows)


class TokenExchange:
    """Redistribution around self-attention: ranks divide the tokens before and after it, and the heads inside it.

    This one is of a single rank, which has all tokens and all heads.
    """

    def to_heads(self, tokens: QKV) -> QKV:
        """From some tokens with all heads to all tokens with some heads."""
        return tokens

    def to_tokens(self, attn_out: Tensor) -> Tensor:
        """From all tokens with some heads to some tokens with all heads.  [B,N,some heads,d] -> [B,some tokens,heads,d]"""
        return attn_out


NO_EXCHANGE = TokenExchange()


@dataclass(frozen=True)
class ClipContext(AttentionContext):
    """Full attention: every token attends to every token of the grid and of the memory."""

    positions: Rotation

    def attend(self, attention: Attention, tokens: QKV) -> Tensor:
        """One attention over all tokens.  -> [B,N,heads,d]"""
        return attention(*rotate_both(tokens.queries, tokens.keys, self.positions), tokens.values)


@dataclass(frozen=True)
class BlockCausalContext(AttentionContext):
    """A whole rollout in one training pass: memory attends to memory; block i to memory and blocks i - window + 1 to i.

    The grid's tokens come first, the memory's last. `memory_keys[i]` rotates the memory's keys for block i, because the
    position of the reference depends on the block.
    """

    grid: Rotation
    memory: Rotation
    memory_keys: tuple[Rotation, ...]
    window: int

    def attend(self, attention: Attention, tokens: QKV) -> Tensor:
        """One attention per block, without a mask, so that fused kernels can be used.  -> [B,N,heads,d]"""
        size = self.grid.shape[0]
        (grid_q, memory_q), (grid_k, memory_k), (grid_v, memory_v) = ((x[:, :size], x[:, size:]) for x in tokens)
        grid_q, grid_k = rotate(grid_q, self.grid), rotate(grid_k, self.grid)
        length = size // len(self.memory_keys)
        rotated = {id(rotation): rotate(memory_k, rotation) for rotation in self.memory_keys}
        attn_out = []
        for index, rotation in enumerate(self.memory_keys):
            first, last = max(0, index + 1 - self.window) * length, (index + 1) * length
            block_k = torch.cat((rotated[id(rotation)], grid_k[:, first:last]), dim=1)
            block_v = torch.cat((memory_v, grid_v[:, first:last]), dim=1)
            attn_out.append(attention(grid_q[:, last - length : last], block_k, block_v))
        attn_out.append(attention(rotate(memory_q, self.memory), rotate(memory_k, self.memory), memory_v))
        return torch.cat(attn_out, dim=1)
