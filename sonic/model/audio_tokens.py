"""The audio encoder, from speech features to a few tokens per latent frame, and the cross-attention from noisy tokens to them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from sonic.model.blocks import MultiHead, modulate
from sonic.model.compile import Uncompiled, region
from sonic.model.cpu import Linear, linear, product_dtype


class AudioTokens(NamedTuple):
    """Audio of each latent frame: tokens [B,T,A,D] for cross-attention and a summary [B,T,D] for modulation.

    With several actors the first axis is batch · actors. `masks` [B·actors,T,S,1] weights what is added to the patches of each actor.
    """

    tokens: Tensor
    summary: Tensor
    masks: Tensor | None = None


class CausalConv(nn.Conv1d):
    """A causal convolution over time, padded in front by repeating the first column."""

    def forward(self, columns: Tensor) -> Tensor:
        """[B,columns,C] -> [B,columns/stride,C']"""
        (kernel,), (stride,) = self.kernel_size, self.stride
        past = columns[:, :1].expand(-1, kernel - 1, -1)
        windows = torch.cat((past, columns), dim=1).unfold(1, kernel, stride)
        return linear(windows.flatten(2), self.weight.flatten(1), self.bias)


class AudioEncoder(nn.Module):
    """A weighted sum of a speech encoder's K layers, then causal convolutions that shrink time by 4: tokens and one summary per latent
    frame."""

    def __init__(self, audio_dim: int, hidden_dim: int, *, num_layers: int, num_tokens: int):
        super().__init__()
        if hidden_dim % 4:
            raise ValueError(f"hidden_dim={hidden_dim} must be a multiple of 4: the audio encoder widens it in two steps")
        quarter, half = hidden_dim // 4, hidden_dim // 2
        self.num_tokens = num_tokens
        self.layer_weights = nn.Parameter(torch.full((1, num_layers, 1, 1), 0.01))
        self.local = CausalConv(audio_dim, quarter * num_tokens, 3)
        self.pooled = CausalConv(audio_dim, quarter, 3)
        self.shrink = CausalConv(quarter, half, 3, stride=2)
        self.shrink_again = CausalConv(half, hidden_dim, 3, stride=2)
        self.out = Linear(hidden_dim, hidden_dim)
        self.padding = nn.Parameter(torch.zeros(1, 1, 1, hidden_dim))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """[B,K,E,F] -> tokens [B,T,A,D], A = num_tokens + 1, and summary [B,T,D], T = ceil(ceil(F/2)/2)"""
        weights = F.silu(self.layer_weights.float())
        mixed = (features.to(weights) * weights).sum(dim=1) / weights.sum(dim=1)
        columns = rearrange(mixed, "b e f -> b f e").to(self.out.weight.dtype)
        branches = torch.cat((self.local(columns), self.pooled(columns)), dim=-1)
        separate = rearrange(branches, "b f (branches c) -> (b branches) f c", branches=self.num_tokens + 1)
        shrunk = rearrange(self._shrink(separate), "(b branches) t d -> b t branches d", branches=self.num_tokens + 1)
        tokens, summary = shrunk[:, :, :-1], self.out(shrunk[:, :, -1])
        padding = self.padding.to(tokens.dtype).expand(*tokens.shape[:2], -1, -1)
        return torch.cat((tokens, padding), dim=2), summary

    def clip(self, features: Tensor, motion_frames: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """`forward` of a clip whose first column is repeated `motion_frames[0]` times in front; the first `motion_frames[1]` latent frames
        of the result are cut off.  [B,K,E,F] -> tokens [B,T,A,D] and summary [B,T,D]

        The encoder is causal and its output for a constant input is constant, so repeated columns that fill whole strides are not computed.
        """
        repeats, cut = motion_frames
        spare = min((repeats - 1) // 4, cut)
        past = repeat(features[..., :1], "b k e 1 -> b k e f", f=repeats - 4 * spare)
        tokens, summary = self(torch.cat((past, features), dim=-1))
        return tokens[:, cut - spare :], summary[:, cut - spare :]

    def _shrink(self, columns: Tensor) -> Tensor:
        columns = self.shrink(F.silu(_plain_norm(columns)))
        return F.silu(_plain_norm(self.shrink_again(F.silu(_plain_norm(columns)))))


class AudioInjector(nn.Module):
    """Cross-attention from the tokens of each latent frame to the audio tokens of that frame, after a norm modulated by their summary."""

    EPS = 1e-5  # of this norm only; the others use the model's

    def __init__(self, hidden_dim: int, num_heads: int, eps: float):
        super().__init__()
        self.modulation = Linear(hidden_dim, 2 * hidden_dim)
        self.attention = MultiHead(hidden_dim, num_heads, eps)

    @region
    def forward(self, grid: Tensor, audio: AudioTokens) -> Tensor:
        """The attention output, which is to be added to the grid.  [B,T,S,D] -> [B,T,S,D]"""
        actors = audio.tokens.shape[0] // grid.shape[0]
        tokens = repeat(grid, "b t s d -> (b actors) t s d", actors=actors) if actors > 1 else grid
        shift, scale = rearrange(Uncompiled.call(self.modulation, F.silu(audio.summary)).float(), "b t (two d) -> two b t 1 d", two=2)
        normed = modulate(tokens, shift, 1 + scale, eps=self.EPS).to(product_dtype(self.modulation.weight))
        queries, rows = rearrange(normed, "b t s d -> (b t) s d"), rearrange(audio.tokens, "b t a d -> (b t) a d")
        attn_out = Uncompiled.call(self.attention, queries, rows)
        residual = rearrange(attn_out, "(b t) s d -> b t s d", t=grid.shape[1])
        if audio.masks is not None:
            return rearrange(residual * audio.masks, "(b actors) t s d -> b actors t s d", actors=actors).sum(dim=1)
        return residual


def _plain_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)
