"""Ulysses sequence parallelism: ranks divide the tokens of every latent frame, and exchange them for heads around self-attention.

Shapes: N tokens of a packed sequence over all ranks, "some" a rank's share of tokens or heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor

from sonic.model.attention import QKV, TokenExchange
from sonic.model.blocks import Layout
from sonic.model.execution import SequenceParallel
from sonic.parallel.mesh import World
from sonic.system.heartbeat import waiting_for_others

_all_gather = getattr(funcol, "all_gather_single_autograd", None) or funcol.all_gather_tensor_autograd  # its new name, its old name


class Group(NamedTuple):
    """The ranks that divide tokens, and the index of this one. The number of ranks need not divide the number of tokens or heads."""

    group: dist.ProcessGroup
    rank: int
    size: int
    device: torch.device = torch.device("cpu")

    def shares(self, total: int) -> list[int]:
        """The number of tokens or heads of each rank when there are `total`."""
        return [total // self.size + (rank < total % self.size) for rank in range(self.size)]


class UlyssesSequence(SequenceParallel):
    """The `SequenceParallel` that divides every frame's tokens, and those of the memory, among the ranks of a group."""

    def __init__(self, group: Group, num_heads: int) -> None:
        self.group, self.num_heads = group, num_heads

    def split(self, tokens: Tensor) -> Tensor:
        """This rank's tokens of each frame.  [B,T,S,D] -> [B,T,some,D]"""
        return tokens.split(self.group.shares(tokens.shape[2]), dim=2)[self.group.rank]

    def gather(self, tokens: Tensor, size: int) -> Tensor:
        """The tokens of all ranks.  [B,T,some,D] -> [B,T,size,D]"""
        shares = self.group.shares(size)
        padded = F.pad(tokens, (0, 0, 0, shares[0] - tokens.shape[2])).contiguous()
        with waiting_for_others():
            parts = _all_gather(padded, gather_dim=2, group=self.group.group).chunk(self.group.size, dim=2)
        return torch.cat([part[:, :, :share] for part, share in zip(parts, shares, strict=True)], dim=2)

    def local_heads(self, num_heads: int) -> int:
        """Number of heads that this rank computes in self-attention."""
        return self.group.shares(num_heads)[self.group.rank]

    def exchange(self, layout: Layout) -> TokenExchange:
        """The exchange of tokens for heads for a packed sequence; `layout` counts the tokens of all ranks."""
        return Ulysses(self.group, layout, self.group.shares(self.num_heads))


class Ulysses(TokenExchange):
    """The exchange: one all-to-all before attention and one after it. Source: DeepSpeed-Ulysses, arXiv 2309.14509."""

    def __init__(self, group: Group, layout: Layout, heads: Sequence[int]) -> None:
        self.group, self.head_counts = group, list(heads)
        lengths = [frames * size for frames, size in layout]
        parts = torch.arange(sum(lengths), device=group.device).split(lengths)
        shares = [part.view(shape).split(group.shares(shape[1]), dim=1) for part, shape in zip(parts, layout, strict=True)]
        owned = [torch.cat([share[rank].flatten() for share in shares]) for rank in range(group.size)]
        self.lengths = [len(tokens) for tokens in owned]
        self.by_rank = torch.cat(owned)  # the tokens of all ranks, those of a rank one after the other, as positions in the sequence
        self.whole = self.by_rank.argsort()

    def to_heads(self, tokens: QKV) -> QKV:
        """[B,some,heads,d] -> [B,N,some heads,d], with the tokens in the order of a single rank."""
        ours = torch.stack(tokens)  # [3,B,some,heads,d]
        shapes = [(*ours.shape[:2], length, self.head_counts[self.group.rank], ours.shape[4]) for length in self.lengths]
        received = self._swap(ours.split(self.head_counts, dim=3), shapes)
        return QKV(*torch.cat(received, dim=2).index_select(2, self.whole))

    def to_tokens(self, attn_out: Tensor) -> Tensor:
        """[B,N,some heads,d] -> [B,some,heads,d]"""
        sent = attn_out.index_select(1, self.by_rank).split(self.lengths, dim=1)
        shapes = [(attn_out.shape[0], self.lengths[self.group.rank], count, attn_out.shape[3]) for count in self.head_counts]
        return torch.cat(self._swap(sent, shapes), dim=2)

    def _swap(self, sent: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Send `sent[i]` to rank i and receive a tensor of shape `shapes[i]` from it."""
        flat = torch.cat([part.flatten() for part in sent])
        sizes = [math.prod(shape) for shape in shapes]
        with waiting_for_others():
            received = funcol.all_to_all_single_autograd(flat, sizes, [part.numel() for part in sent], self.group.group).split(sizes)
        return [part.view(shape) for part, shape in zip(received, shapes, strict=True)]


def sequence_parallel(world: World, num_heads: int) -> SequenceParallel:
    """The division of each frame's tokens among the ranks along cp; model outputs are complete on every rank.

    A training's mean of gradients over all ranks is right: the gradients of shares add up over the ranks that share a batch, and the
    mean counts each of these ranks.
    """
    if world.size("cp") == 1:
        return SequenceParallel()
    return UlyssesSequence(Group(world.group("cp"), world.coordinate("cp"), world.size("cp"), world.device), num_heads)
