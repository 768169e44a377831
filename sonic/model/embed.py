"""Embeddings of latents, text, timesteps and past latents, and rotary positions. Shapes: N tokens of a packed sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sonic.model.compile import region
from sonic.model.counts import PACK_SCALES, WIDENED
from sonic.model.cpu import Linear, linear, linear_gelu

Rotation = Tensor  # cosines and sines, float32 [N,1,d/2,2], one of each for each pair of a head's d channels
Positions = tuple[Tensor, Tensor, Tensor]  # time, row, column ids of N tokens, float64 [N]
ROPE_THETA = 10_000.0


class PatchEmbed(nn.Conv3d):
    """Cuts latents into patches and projects each of them: a convolution whose stride equals its kernel."""

    def __init__(self, channels: int, hidden_dim: int, patch: Sequence[int]):
        super().__init__(channels, hidden_dim, kernel_size=tuple(patch), stride=tuple(patch))

    def forward(self, latents: Tensor) -> Tensor:
        """Patch tokens, row by row.  [B,C,T,H,W] -> [B,T',S,D]. Raises ValueError when the patches do not fill the latents exactly."""
        p, q, r = self.kernel_size
        if any(size % step for size, step in zip(latents.shape[2:], (p, q, r), strict=True)):
            raise ValueError(f"latents of {list(latents.shape[2:])} (time, height, width) do not divide into patches of {[p, q, r]}")
        patches = rearrange(latents, "b c (t p) (h q) (w r) -> b t (h w) (c p q r)", p=p, q=q, r=r)
        return linear(patches.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class TextEmbed(nn.Module):
    """Projects the prompt's rows; short prompts are padded with zero rows before the projection, as the published weights expect."""

    def __init__(self, text_dim: int, text_len: int, hidden_dim: int):
        super().__init__()
        self.text_len = text_len
        self.expand = Linear(text_dim, hidden_dim)
        self.out = Linear(hidden_dim, hidden_dim)

    def forward(self, rows: Tensor) -> Tensor:
        """[B,L,text_dim] -> [B,text_len,D]. Raises ValueError when L is larger than text_len."""
        missing = self.text_len - rows.shape[1]
        if missing < 0:
            raise ValueError(f"the prompt has {rows.shape[1]} rows; the model reads at most {self.text_len}: shorten it")
        padded = F.pad(rows.to(self.expand.weight.dtype), (0, 0, 0, missing))
        return self.out(linear_gelu(self.expand, padded))


WIDENED_ON_CPU = 1 << 21  # weights converted to float32 at a time, 8 MiB: few enough to be in the cache when they are multiplied


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32, also under autocast; weights stored in less precision are converted piece by piece."""

    def forward(self, x: Tensor) -> Tensor:
        """[...,D] -> [...,D']"""
        narrow = max(1, (WIDENED_ON_CPU if self.weight.device.type == "cpu" else WIDENED) // self.in_features)
        rows = self.out_features if self.weight.dtype == torch.float32 else narrow
        pieces = zip(self.weight.split(rows), self.bias.split(rows), strict=True)
        with torch.autocast(x.device.type, enabled=False):
            return torch.cat([linear(x.float(), weight.float(), bias.float()) for weight, bias in pieces], dim=-1)


class TimeEmbed(nn.Module):
    """The modulation of the blocks as a function of the noise level, computed in float32 in whatever precision the weights are stored."""

    def __init__(self, freq_dim: int, hidden_dim: int):
        super().__init__()
        self.freq_dim = freq_dim
        self.expand = Float32Linear(freq_dim, hidden_dim)
        self.out = Float32Linear(hidden_dim, hidden_dim)
        self.project = Float32Linear(hidden_dim, 6 * hidden_dim)

    def forward(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Timesteps [B,T] in 0..1000 -> embedding [B,T,D] for the head, modulation [B,T,6,D] for the blocks; 1 is added to its scales."""
        waves = sinusoid(timestep, self.freq_dim).float()
        embedding = self.out(F.silu(self.expand(waves)))
        projected = self.project(F.silu(embedding))
        projected.unflatten(-1, (6, -1))[:, :, SCALES] += 1  # of the base: a hook on a view changed in place crashes torch
        return embedding, rearrange(projected, "b t (six d) -> b t six d", six=6)


class FramePack(nn.Module):
    """Embeds past latents in few tokens: the newest latent frames in the usual patches, older ones in larger patches.

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
        """Past latents [B,C,Tm,H,W], oldest first -> [B,1,M,D], newest first.

        `keep` is 2 to use all buckets, 1 to replace the newest by zeros, 0 to replace the newest two.
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


SCALES = slice(1, None, 3)  # rows 1 and 4 of the modulation are scales; 0 and 3 are shifts, 2 and 5 are gates


def sinusoid(timestep: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding: cosines, then sines, at geometrically spaced frequencies.  [...] -> float64 [...,dim]"""
    frequencies = ROPE_THETA ** -(torch.arange(dim // 2, dtype=torch.float64, device=timestep.device) / (dim // 2))
    angles = timestep.double()[..., None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def grid_positions(times: Tensor, height: int, width: int) -> Positions:
    """Position ids of all patches of a grid at the given time ids; `height` and `width` count patches."""
    rows, columns = (torch.arange(size, dtype=torch.float64, device=times.device) for size in (height, width))
    return _every_pair(times.double(), rows, columns)


def motion_positions(buckets: Sequence[int], height: int, width: int, *, device: torch.device | None = None) -> Positions:
    """Position ids of the FramePack tokens: negative times that count back from the clip, larger patches spread evenly over the grid."""
    parts, past = [], 0
    for bucket, scale in zip(buckets, PACK_SCALES, strict=True):
        times = -_spread(past + bucket, past + 1, bucket // scale, device=device)
        rows, columns = (_spread(0, size - 1, size // scale, device=device) for size in (height, width))
        parts.append(_every_pair(times, rows, columns))
        past += bucket
    return tuple(torch.cat(ids) for ids in zip(*parts, strict=True))


def ref_time_id(start: int, *, ref_position: int = 30, distance: int = 30) -> int:
    """Time id of the reference for a block that starts at latent frame `start`: `ref_position` at first, later `start` + `distance`."""
    return ref_position + max(0, start - (ref_position - distance))


def rotation(positions: Positions, head_dim: int) -> Rotation:
    """Cosines and sines of rotary positions, computed from float64 angles; there is no table, so positions have no upper limit.

    A head's pairs of channels are divided among time, rows and columns. Source: RoFormer, arXiv 2104.09864.
    """
    side = head_dim // 6
    angles = []
    for ids, pairs in zip(positions, (head_dim // 2 - 2 * side, side, side), strict=True):
        frequencies = ROPE_THETA ** -(torch.arange(pairs, dtype=torch.float64, device=ids.device) / pairs)
        angles.append(ids[:, None] * frequencies)
    angle = rearrange(torch.cat(angles, dim=1), "n pairs -> n 1 pairs")
    return torch.stack((angle.cos(), angle.sin()), dim=-1).float()


def rotate(heads: Tensor, turns: Rotation) -> Tensor:
    """Rotate neighbouring pairs of channels by their angles, in float32.  [B,N,heads,d] -> [B,N,heads,d]

    (even, odd) becomes (even·cos - odd·sin, odd·cos + even·sin), which is a product of complex numbers. In its result the tokens of one
    head are contiguous, which attention multiplies fastest.
    """
    if torch.compiler.is_compiling():  # one kernel anyway, but none of complex numbers
        (even, odd), (cos, sin) = heads.float().unflatten(-1, (-1, 2)).unbind(-1), turns.unbind(-1)
        return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(heads.dtype)
    wide = heads.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    turned = torch.view_as_complex(wide.unflatten(-1, (-1, 2))) * torch.view_as_complex(turns).transpose(0, 1)
    return torch.view_as_real(turned).flatten(-2).to(heads.dtype).transpose(1, 2)


def _spread(first: int, last: int, count: int, *, device: torch.device | None) -> Tensor:
    """`count` numbers at equal distances from `first` to `last`, rounded down.  -> float64 [count]"""
    steps = max(1, count - 1)
    return ((first * steps + (last - first) * torch.arange(count, device=device)) // steps).double()


@region
def rotate_both(queries: Tensor, keys: Tensor, turns: Rotation) -> tuple[Tensor, Tensor]:
    """`rotate` of queries and keys at the same positions."""
    return rotate(queries, turns), rotate(keys, turns)


@region
def rotate_into(slots: Sequence[Tensor], tokens: tuple[Tensor, Tensor, Tensor], turns: Rotation) -> Tensor:
    """Write the rotated keys and the values of tokens into their slots of a KV ring; gives the rotated queries."""
    queries, keys, values = tokens
    for slot, new in zip(slots, (rotate(keys, turns), values), strict=True):
        slot.copy_(new)
    return rotate(queries, turns)


def _every_pair(times: Tensor, rows: Tensor, columns: Tensor) -> Positions:
    time, row, column = torch.meshgrid(times, rows, columns, indexing="ij")
    return time.flatten(), row.flatten(), column.flatten()
