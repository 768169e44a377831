"""How queries meet keys, and what the tokens of a layer may look at. No weights live here."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sonic.model.cpu_attention import by_products, products_are_faster
from sonic.model.embed import Rotation, rotate
from sonic.model.pointwise import slow_here
from sonic.types import pick

log = logging.getLogger("sonic.model")

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v [B,N,heads,d] -> [B,N,heads,d]
KeysValues = tuple[Tensor, Tensor]


def sdpa(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Softmax attention by torch, without a mask.  [B,N,heads,d] -> [B,N,heads,d]"""
    if not queries.numel():  # a rank that has no head of this attention
        return queries
    slow, learning = slow_here(queries), any(rows.requires_grad for rows in (queries, keys, values))
    if slow and not learning and products_are_faster():
        return by_products(queries, keys, values)
    queries, keys, values = (x.transpose(1, 2) for x in (queries, keys, values))
    if slow and learning:  # backward through torch's CPU kernel takes longer in bfloat16 than through plain products
        scores = (queries * queries.shape[-1] ** -0.5) @ keys.mT
        return (scores.softmax(-1) @ values).transpose(1, 2)
    return F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2)


def xformers(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The same by the kernels of xformers, which need CUDA.  [B,N,heads,d] -> [B,N,heads,d]"""
    if not queries.numel():
        return queries
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(queries, keys, values)


ATTENTION: dict[str, Attention] = {"sdpa": sdpa, "xformers": xformers}


def attention_for(name: str, device: torch.device) -> Attention:
    """The attention of that name (run.attention) where the device can run it, else torch's, and a warning says so.

    Raises ValueError when its package is not installed.
    """
    if name == "xformers" and device.type != "cuda":
        log.warning("run.attention=xformers has kernels for CUDA only; on %s torch's own attention is used (sdpa)", device.type)
        return sdpa
    if name == "xformers" and find_spec("xformers") is None:
        raise ValueError("run.attention=xformers needs the package xformers: pip install xformers; run.attention=sdpa needs nothing")
    return pick(ATTENTION, name, "run.attention")


class QKV(NamedTuple):
    """Queries, keys and values of all tokens, each [B,N,heads,d], not rotated yet."""

    queries: Tensor
    keys: Tensor
    values: Tensor


class AttentionContext(Protocol):
    """What the tokens of one layer may attend to; it also knows where they sit."""

    def attend(self, attention: Attention, tokens: QKV) -> Tensor:
        """What each token hears, [B,N,heads,d]."""

    def text(self, project: Callable[[Tensor], KeysValues], rows: Tensor | None) -> KeysValues:
        """Keys and values of the prompt, projected now or remembered."""


class TokenExchange(Protocol):
    """Between projection and attention: tokens may be shared out among ranks there, and heads here."""

    def to_heads(self, tokens: QKV) -> QKV:
        """Some tokens with all heads become all tokens with some heads."""

    def tokens(self, attn_out: Tensor) -> Tensor:
        """The way back.  [B,N,some heads,d] -> [B,some tokens,heads,d]"""


class NoExchange:
    """One rank has all tokens and all heads."""

    def to_heads(self, tokens: QKV) -> QKV:
        """Nothing to exchange."""
        return tokens

    def tokens(self, attn_out: Tensor) -> Tensor:
        """Nothing to exchange."""
        return attn_out


class UncachedText:
    """Projects the prompt every time it is asked."""

    def text(self, project: Callable[[Tensor], KeysValues], rows: Tensor) -> KeysValues:
        """Keys and values [B,L,heads,d] of text rows [B,L,D]."""
        return project(rows)


@dataclass(frozen=True)
class ClipContext(UncachedText):
    """Every token sees every token, grid and memory alike."""

    positions: Rotation

    def attend(self, attention: Attention, tokens: QKV) -> Tensor:
        """One attention over all of them."""
        return attention(rotate(tokens.queries, self.positions), rotate(tokens.keys, self.positions), tokens.values)


@dataclass(frozen=True)
class BlockCausalContext(UncachedText):
    """Training's view of a rollout: memory sees itself; block i sees memory and the last `window` blocks up to i.

    The grid's tokens come first, the memory's last. `memory_keys[i]` rotates the memory's keys as block i sees them,
    because the reference moves along with the stream.
    """

    grid: Rotation
    memory: Rotation
    memory_keys: tuple[Rotation, ...]
    window: int

    def attend(self, attention: Attention, tokens: QKV) -> Tensor:
        """One unmasked attention per block, so that the fast kernels stay usable."""
        size = self.grid[0].shape[0]
        (grid_q, memory_q), (grid_k, memory_k), (grid_v, memory_v) = ((x[:, :size], x[:, size:]) for x in tokens)
        grid_q, grid_k = rotate(grid_q, self.grid), rotate(grid_k, self.grid)
        length = size // len(self.memory_keys)
        seen = {id(rotation): rotate(memory_k, rotation) for rotation in self.memory_keys}
        attn_out = []
        for index, rotation in enumerate(self.memory_keys):
            first, last = max(0, index + 1 - self.window) * length, (index + 1) * length
            block_k = torch.cat((seen[id(rotation)], grid_k[:, first:last]), dim=1)
            block_v = torch.cat((memory_v, grid_v[:, first:last]), dim=1)
            attn_out.append(attention(grid_q[:, last - length : last], block_k, block_v))
        attn_out.append(attention(rotate(memory_q, self.memory), rotate(memory_k, self.memory), memory_v))
        return torch.cat(attn_out, dim=1)
