"""The size of a UNet that denoises windows and the arithmetic of one call, counted from its config: weights and operations. No tensors."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

from sonic.config import UNetConfig

CACHED_FRAMES = 250  # longest clip whose audio keys and values are kept: in a longer one they would take more memory than they save time
IN_CHANNELS, OUT_CHANNELS, ADDED_IDS = 8, 4, 3


class UNetUnit(NamedTuple):
    """A block of the UNet: channels into and out of each residual block, how many of those have a transformer after them, and what ends it.

    `level` is how often the sides of its latents were halved; `sampler` is the change of level at its end.
    """

    level: int
    channels: int
    heads: int
    residuals: list[tuple[int, int]]
    transformers: int = 0
    sampler: int = 0


class WindowCall(NamedTuple):
    """One call: the size of the latents [h,w], and the rows of guidance: with sound; and without; and without the picture as well."""

    height: int
    width: int
    rows: int = 3
    frames: int = 25

    def size(self, level: int) -> tuple[int, int]:
        """Rows and columns of pixels of a frame at a level."""
        return -(-self.height // 2**level), -(-self.width // 2**level)


def unet_units(config: UNetConfig) -> Iterator[UNetUnit]:
    """The blocks in the order in which they run: down, middle, up."""
    channels, heads, layers = config.block_out_channels, config.num_attention_heads, config.layers_per_block
    last = len(channels) - 1
    for level, width in enumerate(channels):
        residuals = [(channels[max(level - 1, 0)], width)] + [(width, width)] * (layers - 1)
        yield UNetUnit(level, width, heads[level], residuals, layers * (level < last), int(level < last))
    yield UNetUnit(last, channels[last], heads[last], [(channels[last],) * 2] * 2, 1)
    for level in range(last, -1, -1):
        width, below, above = channels[level], channels[min(level + 1, last)], channels[max(level - 1, 0)]
        inputs = [below + width] + [2 * width] * (layers - 1) + [width + above]  # of the block before, and what the way down left
        yield UNetUnit(level, width, heads[level], [(each, width) for each in inputs], (layers + 1) * (level < last), -int(level > 0))


def unet_weights(config: UNetConfig) -> int:
    """Number of weights of the whole UNet."""
    return unet_end_weights(config) + sum(unit_weights(config, unit) for unit in unet_units(config))


def unet_end_weights(config: UNetConfig) -> int:
    """Number of weights outside the blocks."""
    first, embed = config.block_out_channels[0], 4 * config.block_out_channels[0]
    embeddings = _linear(first, embed) + _linear(ADDED_IDS * config.addition_time_embed_dim, embed) + 2 * _linear(embed, embed)
    return embeddings + _linear(9 * IN_CHANNELS, first) + 2 * first + _linear(9 * first, OUT_CHANNELS)


def unit_weights(config: UNetConfig, unit: UNetUnit) -> int:
    """Number of weights of one block."""
    embed, width, context = 4 * config.block_out_channels[0], unit.channels, config.cross_attention_dim
    residuals = 0
    for into, out in unit.residuals:
        spatial = 2 * into + _linear(9 * into, out) + 2 * out + _linear(9 * out, out) + (_linear(into, out) if into != out else 0)
        temporal = 2 * (2 * out + _linear(3 * out, out))
        residuals += spatial + temporal + 2 * _linear(embed, out) + 1
    self_attention, mlp = 4 * width**2 + width, _linear(width, 8 * width) + _linear(4 * width, width)
    cross_attention = 2 * width**2 + width + 4 * context * width
    blocks = 2 * (self_attention + cross_attention) + 3 * mlp + 7 * 2 * width
    ends = 2 * width + 2 * _linear(width, width) + _linear(width, 4 * width) + _linear(4 * width, width) + 1
    return residuals + unit.transformers * (blocks + ends) + (_linear(9 * width, width) if unit.sampler else 0)


def unet_operations(config: UNetConfig, call: WindowCall) -> int:
    """Floating-point operations of one call without gradients and without cached keys, two for a multiply-add."""
    first, embed, images = config.block_out_channels[0], 4 * config.block_out_channels[0], call.rows * call.frames
    embeddings = call.rows * (first * embed + ADDED_IDS * config.addition_time_embed_dim * embed + 2 * embed**2)
    ends = 9 * images * prod(call.size(0)) * first * (IN_CHANNELS + OUT_CHANNELS)
    return 2 * (embeddings + ends + sum(unit_multiplications(config, unit, call) for unit in unet_units(config)))


def unit_multiplications(config: UNetConfig, unit: UNetUnit, call: WindowCall) -> int:
    """Multiply-adds of one block in a call."""
    embed, width, images, size = 4 * config.block_out_channels[0], unit.channels, call.rows * call.frames, call.size(unit.level)
    tokens = images * prod(size)
    residuals = sum(tokens * (9 * into + 15 * out + (into != out) * into) * out + 2 * images * embed * out for into, out in unit.residuals)
    keys = prod(size) + call.frames  # of a token in both self-attentions
    own = tokens * (2 + 8 + 36) * width**2 + 2 * tokens * keys * width  # first and last layer, two self-attentions, three MLPs
    transformer = own + 8 * images * width**2 + _cross_attentions(config, unit, call)
    after = call.size(unit.level + unit.sampler)
    taps = 4 if unit.sampler < 0 and after == (2 * size[0], 2 * size[1]) else 9
    sampler = images * prod(after) * taps * width**2 if unit.sampler else 0
    return residuals + unit.transformers * transformer + sampler


def _cross_attentions(config: UNetConfig, unit: UNetUnit, call: WindowCall) -> int:
    """Multiply-adds of both cross-attentions of a transformer."""
    audio, context, width, images = config.audio_tokens, config.cross_attention_dim, unit.channels, call.rows * call.frames
    differing = min(call.rows, 2)  # rows with a picture; rows that differ in their audio
    sets = call.frames + (call.rows > 1) + differing  # of audio tokens: of each frame, of silence, and the means of the rows
    tokens = images * prod(call.size(unit.level))
    known = 2 * differing * context * width + 2 * sets * audio * context * width
    if audio >= width // unit.heads:
        return known + 4 * tokens * (width + audio) * width
    return known + 2 * sets * audio * width**2 + 4 * tokens * unit.heads * audio * width + (images + call.rows) * width**2


def cached_numbers(config: UNetConfig) -> int:
    """Numbers that the cache of a clip holds per frame: keys and values of its audio tokens in each spatial cross-attention."""
    return 2 * config.audio_tokens * sum(unit.transformers * unit.channels for unit in unet_units(config))


def _linear(into: int, out: int) -> int:
    return into * out + out
