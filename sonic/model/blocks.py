"""The repeated parts of the DiT: attention with its projections, the block, the head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sonic.model.attention import Attention, KeysValues, Projected, Reach, sdpa


class MultiHead(nn.Module):
    """Projections of one attention. Queries and keys are RMS-normalised over ALL heads at once."""

    def __init__(self, hidden_dim: int, num_heads: int, eps: float):
        super().__init__()
        self.num_heads = num_heads
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(hidden_dim, hidden_dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(hidden_dim, eps), nn.RMSNorm(hidden_dim, eps)
        self.attention: Attention = sdpa  # parallel plans wrap this attribute

    def queries(self, tokens: Tensor) -> Tensor:
        """[B,T,S,D] -> [B,N,heads,d]"""
        return self._split(self.norm_q(self.to_q(tokens)))

    def keys_values(self, tokens: Tensor) -> KeysValues:
        """[B,T,S,D] -> two of [B,N,heads,d]"""
        return self._split(self.norm_k(self.to_k(tokens))), self._split(self.to_v(tokens))

    def join(self, heard: Tensor, frames: int) -> Tensor:
        """[B,N,heads,d] -> [B,T,S,D]"""
        return self.to_out(rearrange(heard, "b (t s) heads d -> b t s (heads d)", t=frames))

    def forward(self, tokens: Tensor, keys_values: KeysValues) -> Tensor:
        """Attend to something else, without positions.  [B,T,S,D] -> [B,T,S,D]"""
        return self.join(self.attention(self.queries(tokens), *keys_values), tokens.shape[1])

    def _split(self, tokens: Tensor) -> Tensor:
        return rearrange(tokens, "b t s (heads d) -> b (t s) heads d", heads=self.num_heads)


class Block(nn.Module):
    """Self-attention over what `reach` allows, text attention, MLP. The first and last are modulated by the noise level.

    It works on a tuple of streams: the grid of noisy tokens, the memory, or both.
    """

    def __init__(self, hidden_dim: int, ffn_dim: int, num_heads: int, *, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.modulation = nn.Parameter(torch.randn(1, 6, hidden_dim) / hidden_dim**0.5)
        self.self_attention = MultiHead(hidden_dim, num_heads, eps)
        self.text_norm = nn.LayerNorm(hidden_dim, eps)
        self.text_attention = MultiHead(hidden_dim, num_heads, eps)
        self.mlp_in = nn.Linear(hidden_dim, ffn_dim)
        self.mlp_out = nn.Linear(ffn_dim, hidden_dim)

    def forward(
        self, streams: tuple[Tensor, ...], modulations: tuple[Tensor, ...], text: Tensor | None, *, reach: Reach
    ) -> tuple[Tensor, ...]:
        """Streams [B,T,S,D], their modulations [B,T,6,D] (T or B may be 1), text [B,1,L,D] -> streams"""
        tables = [self._table(modulation, x.dtype) for modulation, x in zip(modulations, streams, strict=True)]
        projected = []
        for x, (shift, scale, *_) in zip(streams, tables, strict=True):
            normed = modulate(x, shift, scale, eps=self.eps)
            projected.append(Projected(self.self_attention.queries(normed), *self.self_attention.keys_values(normed)))
        heard = reach.attend(self.self_attention.attention, projected)
        prompt = reach.text(self.text_attention.keys_values, text)
        return tuple(self._finish(x, h, table, prompt=prompt) for x, h, table in zip(streams, heard, tables, strict=True))

    def _finish(self, x: Tensor, heard: Tensor, table: Tensor, *, prompt: KeysValues) -> Tensor:
        _, _, gate, mlp_shift, mlp_scale, mlp_gate = table
        x = torch.addcmul(x, self.self_attention.join(heard, x.shape[1]), gate)
        x = x + self.text_attention(self.text_norm(x), prompt)
        hidden = linear_gelu(self.mlp_in, modulate(x, mlp_shift, mlp_scale, eps=self.eps))
        return torch.addcmul(x, self.mlp_out(hidden), mlp_gate)

    def _table(self, modulation: Tensor, dtype: torch.dtype) -> Tensor:
        """Six rows, shift, scale, gate twice, each [B,T,1,D], summed in float32."""
        return rearrange(self.modulation.float() + modulation, "b t six d -> six b t 1 d").to(dtype)


class Head(nn.Module):
    """Last modulation and projection back to latents."""

    def __init__(self, hidden_dim: int, channels: int, patch: tuple[int, int, int], *, eps: float = 1e-6):
        super().__init__()
        self.patch, self.eps = tuple(patch), eps
        self.modulation = nn.Parameter(torch.randn(1, 2, hidden_dim) / hidden_dim**0.5)
        self.project = nn.Linear(hidden_dim, patch[0] * patch[1] * patch[2] * channels)

    def forward(self, tokens: Tensor, summary: Tensor, width: int) -> Tensor:
        """[B,T,S,D] tokens, [B,T,D] summary of the noise level, `width` patches in a row -> [B,C,T,H,W]"""
        table = self.modulation.float() + rearrange(summary, "b t d -> b t 1 d")
        shift, scale = rearrange(table, "b t two d -> two b t 1 d").to(tokens.dtype)
        patches = self.project(modulate(tokens, shift, 1 + scale, eps=self.eps))
        p, q, r = self.patch
        return rearrange(patches, "b t (h w) (p q r c) -> b c (t p) (h q) (w r)", w=width, p=p, q=q, r=r)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, *, eps: float) -> Tensor:
    """Layer norm without weights of its own, times scale, plus shift; [B,T,S,D] with [B,T,1,D]."""
    if scale.numel() == scale.shape[-1]:  # one noise level for everything: the norm's kernel applies it
        return F.layer_norm(x, x.shape[-1:], scale.flatten(), shift.flatten(), eps)
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), scale)


def linear_gelu(layer: nn.Linear, x: Tensor) -> Tensor:
    """GELU in its tanh form after a linear layer.  [...,D] -> [...,D']

    Without gradients on a CPU it is one oneDNN call, because torch's tanh GELU takes as long as the matrix product.
    """
    fused = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
    usable = fused is not None and torch.backends.mkldnn.enabled and x.device.type == "cpu" and not torch.is_grad_enabled()
    plain = type(layer) is nn.Linear and layer.weight.dtype == x.dtype and x.dtype in (torch.float32, torch.bfloat16)
    if usable and plain:
        return fused(x, layer.weight, layer.bias, "gelu", [], "tanh")
    return F.gelu(layer(x), approximate="tanh")
