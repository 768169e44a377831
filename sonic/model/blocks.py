"""The parts of the DiT: attention with its projections, the block, the head. Shapes: N tokens of a packed sequence (see `Layout`).

Tokens, shifts, scales and gates are float32. What goes into products is rounded to their dtype (`product_dtype`), and what comes out
is added to the tokens in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sonic.model.attention import NO_EXCHANGE, QKV, Attention, AttentionContext, KeysValues, TokenExchange, sdpa
from sonic.model.compile import Uncompiled, keeps_inputs, region
from sonic.model.cpu import Linear, RmsNorm, linear_gelu, product_dtype
from sonic.model.embed import Float32Linear

Layout = tuple[tuple[int, int], ...]  # (T, S) of each part of a packed sequence [B,N,D], N = the sum of their T·S


class MultiHead(nn.Module):
    """The projections of one attention. Queries and keys are RMS-normalised over all heads together."""

    def __init__(self, hidden_dim: int, num_heads: int, eps: float):
        super().__init__()
        self.num_heads = num_heads
        self.to_q, self.to_k, self.to_v, self.to_out = (Linear(hidden_dim, hidden_dim) for _ in range(4))
        self.norm_q, self.norm_k = RmsNorm(hidden_dim, eps), RmsNorm(hidden_dim, eps)
        self.attention: Attention = sdpa  # `set_attention` replaces it

    def queries(self, tokens: Tensor) -> Tensor:
        """[B,N,D] -> [B,N,heads,d]"""
        return self._split(self.norm_q(self.to_q(tokens)))

    def keys_values(self, tokens: Tensor) -> KeysValues:
        """[B,N,D] -> two of [B,N,heads,d]"""
        return self._split(self.norm_k(self.to_k(tokens))), self._split(self.to_v(tokens))

    def merge_heads(self, attn_out: Tensor) -> Tensor:
        """[B,N,heads,d] -> [B,N,D]"""
        return self.to_out(attn_out.flatten(2))

    def forward(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """Cross-attention without positions.  tokens [B,N,D], rows [B,L,D] -> [B,N,D]"""
        return self.merge_heads(self.attention(self.queries(tokens), *self.keys_values(rows)))

    def _split(self, tokens: Tensor) -> Tensor:
        return rearrange(tokens, "b n (heads d) -> b n heads d", heads=self.num_heads)


def set_attention(model: nn.Module, attention: Attention) -> None:
    """Make every attention layer of a model use the function `attention`."""
    for module in model.modules():
        if isinstance(module, MultiHead):
            module.attention = attention


class TextAttention(MultiHead):
    """Cross-attention to the prompt, whose keys and values `context` projects or takes from a cache."""

    def forward(self, tokens: Tensor, rows: Tensor | None, *, context: AttentionContext) -> Tensor:
        """tokens [B,N,D], rows [B,L,D] or None where they are cached -> [B,N,D]"""
        return self.merge_heads(self.attention(self.queries(tokens), *context.text(self.keys_values, rows)))


class SelfAttention(MultiHead):
    """Self-attention over the keys that `context` allows."""

    def forward(self, tokens: Tensor, *, context: AttentionContext, exchange: TokenExchange) -> Tensor:
        """[B,N,D] -> [B,N,D]"""
        projected = exchange.to_heads(QKV(self.queries(tokens), *self.keys_values(tokens)))
        return self.merge_heads(exchange.to_tokens(context.attend(self.attention, projected)))


class Float32LayerNorm(nn.LayerNorm):
    """A layer norm that computes in float32, whatever its weights are stored in."""

    def forward(self, x: Tensor) -> Tensor:
        """[...,D] -> float32 [...,D]"""
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)


class Block(nn.Module):
    """Self-attention over the keys that `context` allows, text attention, MLP. The first and last are modulated by the noise level.

    The grid of noisy tokens and the memory are packed into one sequence, so that each linear layer runs once for both.
    """

    def __init__(self, hidden_dim: int, ffn_dim: int, num_heads: int, *, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.modulation = nn.Parameter(torch.randn(1, 6, hidden_dim) / hidden_dim**0.5)
        self.self_attention = SelfAttention(hidden_dim, num_heads, eps)
        self.text_norm = Float32LayerNorm(hidden_dim, eps)
        self.text_attention = TextAttention(hidden_dim, num_heads, eps)
        self.mlp_in = Linear(hidden_dim, ffn_dim)
        self.mlp_out = Linear(ffn_dim, hidden_dim)

    @region
    def forward(
        self,
        tokens: Tensor,
        modulations: tuple[Tensor, ...],
        text: Tensor | None,
        *,
        layout: Layout,
        context: AttentionContext,
        exchange: TokenExchange = NO_EXCHANGE,
    ) -> Tensor:
        """Tokens [B,N,D], the modulation [B,T,6,D] of each part (T or B may be 1), text [B,L,D] -> tokens [B,N,D]

        `tokens` are overwritten where no gradients are needed.
        """
        rows = [modulation_rows(self.modulation, modulation) for modulation in modulations]
        dtype = product_dtype(self.mlp_in.weight)
        normed = per_part(lambda x, row: modulate(x, row(0), row(1), eps=self.eps).to(dtype), layout, rows, tokens)
        attn_out = Uncompiled.call(self.self_attention, normed, context=context, exchange=exchange)
        tokens = add_gated(tokens, attn_out, [row(2) for row in rows], layout=layout)
        del normed, attn_out  # frees them
        tokens = add_residual(tokens, Uncompiled.call(self.text_attention, self.text_norm(tokens).to(dtype), text, context=context))
        normed = per_part(lambda x, row: modulate(x, row(3), row(4), eps=self.eps).to(dtype), layout, rows, tokens)
        return add_gated(tokens, Uncompiled.call(self._mlp, normed), [row(5) for row in rows], layout=layout)

    def _mlp(self, tokens: Tensor) -> Tensor:
        return self.mlp_out(linear_gelu(self.mlp_in, tokens))


class Head(nn.Module):
    """The last modulation, and the projection of tokens back to latents, in float32."""

    def __init__(self, hidden_dim: int, channels: int, patch: tuple[int, int, int], *, eps: float = 1e-6):
        super().__init__()
        self.patch, self.eps = tuple(patch), eps
        self.modulation = nn.Parameter(torch.randn(1, 2, hidden_dim) / hidden_dim**0.5)
        self.project = Float32Linear(hidden_dim, patch[0] * patch[1] * patch[2] * channels)

    def forward(self, tokens: Tensor, time_embedding: Tensor) -> Tensor:
        """tokens [B,T,S,D], time embedding [B,T,D] -> the numbers of a patch of latents for each token [B,T,S,n]"""
        table = self.modulation.float() + rearrange(time_embedding, "b t d -> b t 1 d")
        shift, scale = rearrange(table, "b t two d -> two b t 1 d")
        return self.project(modulate(tokens, shift, 1 + scale, eps=self.eps))

    def to_latents(self, patches: Tensor, width: int) -> Tensor:
        """Patches of latents [B,T,S,n], `width` of them in a row -> [B,C,T,H,W]"""
        p, q, r = self.patch
        return rearrange(patches, "b t (h w) (p q r c) -> b c (t p) (h q) (w r)", w=width, p=p, q=q, r=r)


def modulation_rows(learnt: Tensor, modulation: Tensor) -> Callable[[int], Tensor]:
    """Shift, scale and gate of the attention, then of the MLP, each [B,T,1,D] by its number: the learnt ones plus those of the noise
    level, in float32. Compiled, each is added by the kernel that uses it.  learnt [1,6,D], modulation [B,T,6,D]"""
    if torch.compiler.is_compiling():
        return partial(_modulation_row, learnt, modulation)
    return rearrange(learnt.float() + modulation, "b t six d -> six b t 1 d").__getitem__


def _modulation_row(learnt: Tensor, modulation: Tensor, number: int) -> Tensor:
    return rearrange(learnt[:, number].float() + modulation[:, :, number], "b t d -> b t 1 d")


def split_parts(tokens: Tensor, layout: Layout) -> list[Tensor]:
    """The parts of a packed sequence, as views.  [B,N,D] -> [B,T,S,D] each"""
    parts = tokens.split([frames * size for frames, size in layout], dim=1)
    return [part.unflatten(1, shape) for part, shape in zip(parts, layout, strict=True)]


def join_parts(parts: Sequence[Tensor]) -> Tensor:
    """The packed sequence of several parts (inverse of `split_parts`); a single part is not copied.  [B,T,S,D] each -> [B,N,D]"""
    flat = [part.flatten(1, 2) for part in parts]
    return flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)


def per_part(change: Callable[..., Tensor], layout: Layout, tables: Sequence[Tensor], *joint: Tensor) -> Tensor:
    """Apply `change(part of each joint tensor, the part's table)` to each part and pack the results.  [B,N,D] -> [B,N,D]"""
    columns = [split_parts(tokens, layout) for tokens in joint]
    return join_parts([change(*row) for row in zip(*columns, tables, strict=True)])


def add_gated(tokens: Tensor, change: Tensor, gates: Sequence[Tensor], *, layout: Layout) -> Tensor:
    """tokens + gate · change, each part with its gate [B,T,1,D]; `tokens` are overwritten where no gradients are needed.
    [B,N,D] -> [B,N,D]"""
    if keeps_inputs():
        return per_part(lambda x, h, gate: torch.addcmul(x, h, gate), layout, gates, tokens, change)
    for x, h, gate in zip(split_parts(tokens, layout), split_parts(change, layout), gates, strict=True):
        x.addcmul_(h, gate)
    return tokens


def add_residual(tokens: Tensor, change: Tensor) -> Tensor:
    """tokens + change, which may be of the first tokens only; `tokens` are overwritten where no gradients are needed.
    [B,N,D], [B,some,D] -> [B,N,D]"""
    count = change.shape[1]
    if keeps_inputs():
        return torch.cat((tokens[:, :count] + change, tokens[:, count:]), dim=1) if count < tokens.shape[1] else tokens + change
    tokens[:, :count].add_(change)
    return tokens


def modulate(x: Tensor, shift: Tensor, scale: Tensor, *, eps: float) -> Tensor:
    """Layer norm without learned weights, times scale, plus shift.  x [B,T,S,D], shift and scale [B,T,1,D] -> [B,T,S,D]"""
    if scale.numel() == scale.shape[-1]:  # one noise level for all tokens: the kernel of the norm applies scale and shift
        return F.layer_norm(x, x.shape[-1:], scale.flatten(), shift.flatten(), eps)
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), scale)
