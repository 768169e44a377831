"""How the transformer is executed, as one argument: which tokens of a frame are here, who runs the blocks, where KV caches lie.

The model knows this interface and its single-device default; what several ranks do is in parallel/.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from sonic.model.attention import Exchange, Reach
from sonic.model.blocks import ALONE, Layout
from sonic.model.trunk_inputs import TrunkInputs

RunBlocks = Callable[[nn.Module, Sequence[TrunkInputs], Sequence[Callable[[int], Reach]]], list[TrunkInputs]]


class SequenceParallel(Protocol):
    """How the tokens of every latent frame are divided among ranks, and exchanged for heads around self-attention."""

    def part(self, tokens: Tensor) -> Tensor:
        """This rank's tokens of each frame.  [B,T,S,D] -> [B,T,some,D]"""

    def whole(self, tokens: Tensor, size: int) -> Tensor:
        """The tokens of all ranks.  [B,T,some,D] -> [B,T,size,D]"""

    def heads(self, num_heads: int) -> int:
        """How many heads this rank has in self-attention."""

    def exchange(self, layout: Layout) -> Exchange:
        """The exchange of tokens for heads, for parts of this layout (all ranks' tokens)."""


class WholeSequence:
    """All tokens are on this rank."""

    def part(self, tokens: Tensor) -> Tensor:
        """The tokens themselves."""
        return tokens

    def whole(self, tokens: Tensor, size: int) -> Tensor:
        """The tokens themselves."""
        return tokens

    def heads(self, num_heads: int) -> int:
        """All heads."""
        return num_heads

    def exchange(self, layout: Layout) -> Exchange:
        """Nothing is exchanged."""
        return ALONE


def run_blocks(model: nn.Module, inputs: Sequence[TrunkInputs], reaches: Sequence[Callable[[int], Reach]]) -> list[TrunkInputs]:
    """Run every sequence through a block before the next block, so that its weights are loaded once."""
    return model.run_blocks(inputs, reaches)


@dataclass(frozen=True)
class Execution:
    """How a forward is executed: `sequence` divides tokens, `run_blocks` runs the blocks that are here, `cache_device` holds KV caches
    (None = beside the weights)."""

    sequence: SequenceParallel = WholeSequence()
    run_blocks: RunBlocks = run_blocks
    cache_device: torch.device | None = None


LOCAL = Execution()
