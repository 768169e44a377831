"""The arguments of a transformer forward: those that a block's sampling steps share, those of the transformer blocks, and a request."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from sonic.model.attention import NO_EXCHANGE, TokenExchange
from sonic.model.audio_tokens import AudioTokens
from sonic.model.blocks import Layout
from sonic.types import BlockSpan


class BlockInputs(NamedTuple):
    """The inputs that all sampling steps of a block share: pose tokens, audio tokens, time id of the reference (None = by the
    configured rule)."""

    span: BlockSpan
    pose: Tensor
    audio: AudioTokens | None
    ref_position: int | None = None


class TrunkInputs(NamedTuple):
    """Inputs to the transformer blocks: tokens, layout, modulation, text, audio.

    tokens [B,N,D], the parts of `layout` one after the other; the modulation [B,T,6,D] of each part; text [B,L,D] or None.
    """

    tokens: Tensor
    layout: Layout
    modulations: tuple[Tensor, ...]
    text: Tensor | None
    audio: AudioTokens | None
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
