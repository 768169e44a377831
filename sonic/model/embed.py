"""From latents, text and time to tokens, and where tokens sit in time and space (rotary positions)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sonic.model.counts import PACK_SCALES
from sonic.model.linear import Linear, linear, linear_gelu

Rotation = tuple[Tensor, Tensor]  # cosines and sines [N,1,d/2] of the pairs of channels
Places = tuple[Tensor, Tensor, Tensor]  # time, row, column ids of N tokens, float64 [N]
ROPE_THETA = 10_000.0


class PatchEmbed(nn.Conv3d):
    """Cut latents into patches and project each of them; a convolution whose kernel is its stride."""

    def __init__(self, channels: int, hidden_dim: int, patch: Sequence[int]):
        super().__init__(channels, hidden_dim, kernel_size=tuple(patch), stride=tuple(patch))

    def forward(self, latents: Tensor) -> Tensor:
        """Patch tokens in row order.  [B,C,T,H,W] -> [B,T',S,D]"""
        p, q, r = self.kernel_size
        if any(size % step for size, step in zip(latents.shape[2:], (p, q, r), strict=True)):
            raise ValueError(f"latents of {list(latents.shape[2:])} (time, height, width) do not divide into patches of {[p, q, r]}")
        patches = rearrange(latents, "b c (t p) (h q) (w r) -> b t (h w) (c p q r)", p=p, q=q, r=r)
        return linear(patches.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class TextEmbed(nn.Module):
    """Project the prompt's rows; short prompts are padded with zero rows FIRST, as the published weights expect."""

    def __init__(self, text_dim: int, text_len: int, hidden_dim: int):
        super().__init__()
        self.text_len = text_len
        self.expand = Linear(text_dim, hidden_dim)
        self.out = Linear(hidden_dim, hidden_dim)

    def forward(self, rows: Tensor) -> Tensor:
        """[B,L,text_dim] -> [B,text_len,D]"""
        missing = self.text_len - rows.shape[1]
        if missing < 0:
            raise ValueError(f"the prompt has {rows.shape[1]} rows; the model reads at most {self.text_len}: shorten it")
        padded = F.pad(rows.to(self.expand.weight.dtype), (0, 0, 0, missing))
        return self.out(linear_gelu(self.expand, padded))


WIDENED = 1 << 21  # weights that a CPU widens at once, 8 MiB: few enough to be still in its cache when they are multiplied


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32 whatever its weights are stored in; narrower ones are widened piece by piece."""

    def forward(self, x: Tensor) -> Tensor:
        """[...,D] -> [...,D']"""
        narrow = max(1, WIDENED // self.in_features) if self.weight.device.type == "cpu" else self.out_features
        rows = self.out_features if self.weight.dtype == torch.float32 else narrow
        pieces = zip(self.weight.split(rows), self.bias.split(rows), strict=True)
        return torch.cat([linear(x, weight.float(), bias.float()) for weight, bias in pieces], dim=-1)


class TimeEmbed(nn.Module):
    """Noise level to modulation, in float32 whatever the weights are stored in."""

    def __init__(self, freq_dim: int, hidden_dim: int):
        super().__init__()
        self.freq_dim = freq_dim
        self.expand = Float32Linear(freq_dim, hidden_dim)
        self.out = Float32Linear(hidden_dim, hidden_dim)
        self.project = Float32Linear(hidden_dim, 6 * hidden_dim)

    def forward(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Timesteps [B,T] in 0..1000 -> summary [B,T,D] for the head and modulation [B,T,6,D] for the blocks, scales plus 1."""
        waves = sinusoid(timestep, self.freq_dim).float()
        summary = self.out(F.silu(self.expand(waves)))
        modulation = rearrange(self.project(F.silu(summary)), "b t (six d) -> b t six d", six=6)
        return summary, modulation + _ones_at(SCALES, modulation)


class FramePack(nn.Module):
    """The past as few tokens: the newest latent frames at full size, older ones in ever larger patches.

    The buckets are [newest, middle, oldest] latent frames; patches grow by (1, 2, 4) in time and space.
    Source: FramePack, arXiv 2504.12626.
    """

    def __init__(self, channels: int, hidden_dim: int, patch: Sequence[int], *, buckets: Sequence[int]):
        super().__init__()
        self.buckets = tuple(buckets)
        self.newest, self.middle, self.oldest = (
            PatchEmbed(channels, hidden_dim, [size * scale for size in patch]) for scale in PACK_SCALES
        )

    def forward(self, motion: Tensor, keep: int = 2) -> Tensor:
        """Latents of the past [B,C,Tm,H,W], oldest first -> [B,1,M,D], newest first.

        `keep` 2 uses all of it; 1 and 0 blank the newest bucket, the newest two.
        """
        total = sum(self.buckets)
        recent = motion[:, :, -total:]
        window = F.pad(recent, (0, 0, 0, 0, total - recent.shape[2], 0))
        blank = sum(self.buckets[: len(self.buckets) - 1 - keep])
        if blank:
            window = torch.cat((window[:, :, :-blank], torch.zeros_like(window[:, :, -blank:])), dim=2)
        oldest, middle, newest = window.split(self.buckets[::-1], dim=2)
        packed = (self.newest(newest), self.middle(middle), self.oldest(oldest))
        return torch.cat([rearrange(tokens, "b t s d -> b 1 (t s) d") for tokens in packed], dim=2)


SCALES = (1, 4)  # rows of the modulation that multiply; 0 and 3 shift, 2 and 5 are gates


def sinusoid(timestep: Tensor, dim: int) -> Tensor:
    """[...] -> [..., dim] float64: cosines, then sines, of geometrically spaced frequencies."""
    frequencies = ROPE_THETA ** -(torch.arange(dim // 2, dtype=torch.float64, device=timestep.device) / (dim // 2))
    angles = timestep.double()[..., None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def grid_places(times: Tensor, height: int, width: int) -> Places:
    """Ids of a full grid of patches at the given time ids."""
    rows, columns = (torch.arange(size, dtype=torch.float64, device=times.device) for size in (height, width))
    return _every_pair(times.double(), rows, columns)


def motion_places(buckets: Sequence[int], height: int, width: int, *, device: torch.device | None = None) -> Places:
    """Ids of the FramePack tokens: negative times counting back from the clip, coarser buckets spread over the grid."""
    parts, past = [], 0
    for bucket, scale in zip(buckets, PACK_SCALES, strict=True):
        times = -np.trunc(np.linspace(past + bucket, past + 1, bucket // scale))
        rows, columns = (np.trunc(np.linspace(0, size - 1, size // scale)) for size in (height, width))
        parts.append(_every_pair(*(torch.as_tensor(ids, dtype=torch.float64, device=device) for ids in (times, rows, columns))))
        past += bucket
    return tuple(torch.cat(ids) for ids in zip(*parts, strict=True))


def ref_time_id(start: int, *, ref_position: int = 30, distance: int = 30) -> int:
    """Where the reference sits for a block starting at latent frame `start`: fixed at first, then `distance` ahead of it."""
    return ref_position + max(0, start - (ref_position - distance))


def rotation(places: Places, head_dim: int) -> Rotation:
    """The rotation of tokens by their positions, from float64 angles: no table, so no last position.

    A head's pairs of channels are shared out between time, rows and columns. Source: RoFormer, arXiv 2104.09864.
    """
    side = head_dim // 6
    angles = []
    for ids, pairs in zip(places, (head_dim // 2 - 2 * side, side, side), strict=True):
        frequencies = ROPE_THETA ** -(torch.arange(pairs, dtype=torch.float64, device=ids.device) / pairs)
        angles.append(ids[:, None] * frequencies)
    angle = rearrange(torch.cat(angles, dim=1), "n pairs -> n 1 pairs")
    return angle.cos().float(), angle.sin().float()


def rotate(heads: Tensor, turn: Rotation) -> Tensor:
    """Turn neighbouring pairs of channels by their angles, in float32.  [B,N,heads,d] -> the same

    (even, odd) becomes (even·cos - odd·sin, odd·cos + even·sin); the partner of a channel is one place ahead or behind in
    memory, so two shifted copies stand for it and nothing is gathered.
    """
    cos, sin = turn
    if heads.device.type == "cpu" and not torch.is_grad_enabled():
        return _rotate_at_once(heads, torch.complex(cos, sin))
    none, wide = torch.zeros_like(sin), heads.float()
    this, ahead, behind = (torch.stack(pair, dim=-1).flatten(-2) for pair in ((cos, cos), (-sin, none), (none, sin)))
    flat, turned = wide.flatten(), wide * this
    turned.addcmul_(flat.roll(-1).view_as(wide), ahead).addcmul_(flat.roll(1).view_as(wide), behind)
    return turned.to(heads.dtype)


def _rotate_at_once(heads: Tensor, turn: Tensor) -> Tensor:
    """The same in one pass, as torch's CPU kernel for complex products does it: a pair times cos + i·sin. Each head's tokens lie
    together in what comes out, as an attention multiplies them fastest."""
    wide = heads.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    turned = torch.view_as_complex(wide.unflatten(-1, (-1, 2))) * turn.transpose(0, 1)
    return torch.view_as_real(turned).flatten(-2).to(heads.dtype).transpose(1, 2)


def _every_pair(times: Tensor, rows: Tensor, columns: Tensor) -> Places:
    time, row, column = torch.meshgrid(times, rows, columns, indexing="ij")
    return time.flatten(), row.flatten(), column.flatten()


def _ones_at(rows: Sequence[int], modulation: Tensor) -> Tensor:
    """[6,1] with ones at the given rows."""
    return modulation.new_tensor([[float(row in rows)] for row in range(6)])
