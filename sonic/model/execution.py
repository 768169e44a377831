"""The arguments of a transformer forward: the inputs of its blocks, and how it is executed (on one device; parallel/ has subclasses)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sonic.geometry import BlockSpan
from sonic.model.attention import NO_EXCHANGE, AttentionContext, TokenExchange
from sonic.model.audio_tokens import AudioTokens
from sonic.model.blocks import Layout
from sonic.model.kv_cache import RingWindows


class BlockInputs(NamedTuple):
    """The inputs that all sampling steps of a block share: pose tokens, audio tokens, time id of the reference (None = by the
    configured rule)."""

    span: BlockSpan
    pose: Tensor
    audio: AudioTokens | None
    ref_position: int | None = None


class TrunkInputs(NamedTuple):
    """Inputs to the transformer blocks, and what passes them by: the time embedding [B,T,D] of the noisy tokens, for the head.

    tokens, float32 [B,N,D], the parts of `layout` one after the other, which blocks overwrite where no gradients are needed; the modulation
    [B,T,6,D] of each part; text [B,L,D] or None.
    """

    tokens: Tensor
    layout: Layout
    modulations: tuple[Tensor, ...]
    text: Tensor | None
    audio: AudioTokens | None
    time_embedding: Tensor
    exchange: TokenExchange = NO_EXCHANGE


class ForwardRequest(NamedTuple):
    """One forward of one block: noisy latents [B,C,T,H,W] and their timestep.

    `cond_index` selects the set of conditions (guidance has two), `step` the KV ring of this sampling step.
    """

    latents: Tensor
    timestep: Tensor
    inputs: BlockInputs
    cond_index: int
    step: int


RunBlocks = Callable[[nn.Module, Sequence[TrunkInputs], Sequence[Callable[[int], AttentionContext]]], list[TrunkInputs]]


class SequenceParallel:
    """The division of every latent frame's tokens among ranks, and the exchange of tokens for heads around self-attention.

    This one is of a single rank, which has all tokens.
    """

    def split(self, tokens: Tensor) -> Tensor:
        """This rank's tokens of each frame.  [B,T,S,D] -> [B,T,some,D]"""
        return tokens

    def gather(self, tokens: Tensor, size: int) -> Tensor:
        """The tokens of all ranks.  [B,T,some,D] -> [B,T,size,D]"""
        return tokens

    def local_heads(self, num_heads: int) -> int:
        """Number of heads that this rank computes in self-attention."""
        return num_heads

    def exchange(self, layout: Layout) -> TokenExchange:
        """The exchange of tokens for heads for a packed sequence; `layout` counts the tokens of all ranks."""
        return NO_EXCHANGE


def run_blocks(model: nn.Module, inputs: Sequence[TrunkInputs], contexts: Sequence[Callable[[int], AttentionContext]]) -> list[TrunkInputs]:
    """Run every sequence through a block before the next block, so that its weights are loaded once."""
    return model.run_blocks(inputs, contexts)


@dataclass(frozen=True)
class Execution:
    """How a forward is executed: `sequence` divides tokens among ranks, `run_blocks` runs this rank's blocks, `cache_device` holds the
    KV rings (None = the device of the inputs), and `windows` says where attention reads them; with `flex_blocks` all blocks of a
    training pass share one attention per layer."""

    sequence: SequenceParallel = SequenceParallel()
    run_blocks: RunBlocks = run_blocks
    cache_device: torch.device | None = None
    windows: RingWindows = RingWindows()
    flex_blocks: bool = False


LOCAL = Execution()
