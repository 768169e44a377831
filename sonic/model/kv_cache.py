"""The KV cache of a rollout: keys and values of the memory tokens and of the last blocks. It is an argument, not state of the model.

Each sampling step has a ring of `window` slots, and block b is written to slot b mod window. A block attends to the memory, to itself,
and to the window - 1 blocks before it: to the range `filled`, in which `own` is its slot. With a window of 4:

                 |  memory  |  slot 0  |  slot 1  |  slot 2  |  slot 3  |
    in block 1   |          |  block 0 | [block 1]|  empty   |  empty   |
                 |<------------ filled ---------->|
    in block 6   |          |  block 4 |  block 5 | [block 6]|  block 3 |      block 6 has replaced block 2
                 |<------------------------ filled -------------------->|

Two sampling steps share one copy of the memory; the slots of the second one lie before it:

    |  slot 3  |  slot 2  |  slot 1  |  slot 0  |  memory  |  slot 0  |  slot 1  |  slot 2  |  slot 3  |
    |<------------------ ring of step 1 ------------------>|
                                                |<------------------ ring of step 0 ------------------>|
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from sonic.config import ModelConfig
from sonic.model.attention import QKV, Attention, AttentionContext, KeysValues
from sonic.model.embed import Positions, Rotation, grid_positions, motion_positions, rotate, rotate_both, rotate_into, rotation


class Slot(NamedTuple):
    """Token ranges of a ring's buffers: `own` of one block, `filled` of everything written once that block is."""

    own: slice
    filled: slice


@dataclass
class KVRing:
    """The buffers of one sampling step: keys and values of each layer [B, M + window · block tokens, heads, d].

    `window` is the number of blocks that the ring holds. Their slots follow the memory, or precede it where `memory` does not start
    at 0. Slots are filled from the memory outwards, so the filled range is contiguous; once the ring is full, a new block replaces
    the oldest. Keys are rotated by their absolute positions, so their order in the ring does not matter.
    `ref_positions` is, for each layer, the time id of the reference that the memory's keys are rotated for.
    """

    keys: dict[int, Tensor]
    values: dict[int, Tensor]
    memory: slice
    block_tokens: int
    window: int
    ref_positions: dict[int, int]
    origin: int | None = None
    newest: int | None = None

    def rewind(self) -> None:
        """Empty the slots of all blocks; the memory stays."""
        self.origin = self.newest = None

    def begin(self, index: int) -> Slot:
        """Reserve the slot of block `index`. Raises ValueError unless it is the newest block again or the one after it."""
        self.origin = index if self.origin is None else self.origin
        if self.newest is not None and index not in (self.newest, self.newest + 1):
            raise ValueError(f"block {index} cannot follow block {self.newest}: a ring is written in order; start a new cache to jump")
        self.newest = index
        count = index - self.origin
        edge = self.slot(min(count, self.window - 1))
        return Slot(self.slot(count % self.window), slice(min(self.memory.start, edge.start), max(self.memory.stop, edge.stop)))

    def slot(self, index: int) -> slice:
        """The range of tokens of slot `index`."""
        if self.memory.start == 0:
            first = self.memory.stop + index * self.block_tokens
        else:
            first = self.memory.start - (index + 1) * self.block_tokens
        return slice(first, first + self.block_tokens)


class CacheShard(NamedTuple):
    """The part of a model's cache that one rank holds: these layers, and this many heads of each."""

    layers: Sequence[int]
    heads: int


class RingWindows:
    """Where the attention of a block reads its ring: here in the ring itself; a subclass in parallel/ is for rings in host memory."""

    def allocated(self, cache: KVCache) -> KVCache:
        """The cache, with its rings read through this object."""
        return replace(cache, windows=self)

    def load(self, context: CachedContext) -> KeysValues:
        """Keys and values of a ring in one layer, in which the block's slot is to be written."""
        context.cache.rotate_reference(context.ring, context.layer, context.ref_position)
        return context.ring.keys[context.layer], context.ring.values[context.layer]

    def store(self, context: CachedContext) -> None:
        """Keep what was written into the block's slot; called after the attention was queued."""


@dataclass
class KVCache:
    """The reference's keys before rotation (its position changes), the prompt's keys and values, and a ring per sampling step.

    Rings 0 and 1, 2 and 3, and so on share one copy of the memory, which lies between the windows of the two.
    `device` holds the rings, `token_device` runs the attention, and `windows` says where it reads a ring.
    """

    rings: list[KVRing]
    grid: tuple[int, int]
    buckets: tuple[int, ...]
    ref_keys: dict[int, Tensor]
    text: dict[int, KeysValues]
    head_dim: int
    device: torch.device
    token_device: torch.device
    windows: RingWindows
    rotations: dict[int, Rotation] = field(default_factory=dict)  # of the reference, for its latest positions

    @classmethod
    def allocate(
        cls, config: ModelConfig, shape: tuple[int, int, int], shard: CacheShard, *, steps: int, motion: bool, like: Tensor
    ) -> KVCache:
        """Empty buffers for `steps` sampling steps over [batch, rows, columns] of patches; dtype and device as `like`."""
        (batch, *grid), rollout = shape, config.rollout
        buckets = tuple(config.motion.buckets) if motion else ()
        size = grid[0] * grid[1]
        memory_tokens = size + (len(motion_positions(buckets, *grid)[0]) if motion else 0)
        head_dim = config.trunk.hidden_dim // config.trunk.num_heads
        empty = lambda length: {layer: like.new_zeros(batch, length, shard.heads, head_dim) for layer in shard.layers}  # noqa: E731
        rings: list[KVRing] = []
        for first in range(0, steps, 2):
            rings += _rings_around(
                memory_tokens, rollout.block_frames * size, rollout.window_blocks, count=min(2, steps - first), empty=empty
            )
        return cls(rings, tuple(grid), buckets, empty(size), {}, head_dim, like.device, like.device, RingWindows())

    @property
    def memory_tokens(self) -> int:
        """Number of tokens of the reference and the motion memory."""
        memory = self.rings[0].memory
        return memory.stop - memory.start

    def rotate_reference(self, ring: KVRing, layer: int, position: int) -> None:
        """Rotate the reference's keys in a layer's buffer for time id `position`, unless they already are."""
        if ring.ref_positions.get(layer) != position:
            ring.keys[layer][:, self.reference_in(ring)] = rotate(self.ref_keys[layer], self.reference_rotation(position))
            ring.ref_positions[layer] = position

    def reference_in(self, ring: KVRing) -> slice:
        """The range of the reference's tokens in a ring."""
        return slice(ring.memory.start, ring.memory.start + math.prod(self.grid))

    def reference_rotation(self, position: int) -> Rotation:
        """The rotation of the reference's keys for time id `position`, on the device that runs the attention."""
        if position not in self.rotations:
            if len(self.rotations) > len(self.rings):  # positions only grow
                self.rotations.clear()
            self.rotations[position] = rotation(memory_positions((), self.grid, position, device=self.token_device), self.head_dim)
        return self.rotations[position]


def _rings_around(memory: int, block: int, window: int, *, count: int, empty: Callable[[int], dict[int, Tensor]]) -> list[KVRing]:
    """One ring, or two that share one memory, with a window on each side of it."""
    size = window * block
    keys, values = (empty(memory + count * size) for _ in range(2))
    ref_positions: dict[int, int] = {}

    def ring(first: int, start: int) -> KVRing:
        views = [{layer: buffer[:, first : first + size + memory] for layer, buffer in buffers.items()} for buffers in (keys, values)]
        return KVRing(*views, slice(start, start + memory), block, window, ref_positions)

    return [ring(0, 0)] if count == 1 else [ring(size, 0), ring(0, size)]


@dataclass(frozen=True)
class PrefillContext(AttentionContext):
    """The attention context of prefill in one layer: memory attends to itself and is written to the cache, the reference at `position`."""

    cache: KVCache
    layer: int
    positions: Rotation
    position: int

    def attend(self, attention: Attention, tokens: QKV) -> Tensor:
        """Attention among the memory tokens; the reference's keys are also stored before rotation."""
        query, key, value = tokens
        raw, rotated = self.cache.ref_keys[self.layer], rotate(key, self.positions)
        raw.copy_(key[:, : raw.shape[1]])
        for ring in self.cache.rings[::2]:  # each of the others shares the memory of one of these
            ring.keys[self.layer][:, ring.memory] = rotated
            ring.values[self.layer][:, ring.memory] = value
            ring.ref_positions[self.layer] = self.position
        return attention(rotate(query, self.positions), rotated, value)

    def text(self, project: Callable[[Tensor], KeysValues], rows: Tensor) -> KeysValues:
        """Keys and values of the prompt; they are stored in the cache for the blocks."""
        self.cache.text[self.layer] = project(rows)
        return self.cache.text[self.layer]


@dataclass(frozen=True)
class CachedContext(AttentionContext):
    """The attention context of one block in one layer: the block itself, the blocks in the ring, and the memory.

    Gradients flow through the block itself only.
    """

    cache: KVCache
    ring: KVRing
    layer: int
    slot: Slot
    positions: Rotation
    ref_position: int

    def attend(self, attention: Attention, tokens: QKV) -> Tensor:
        """Write the block's keys and values into its slot and attend to the filled part of the ring."""
        windows = self.cache.windows
        stored = windows.load(self)
        if torch.is_grad_enabled():
            queries, keys_values = self._written_with_gradients(stored, tokens)
        else:
            queries = rotate_into([each[:, self.slot.own] for each in stored], tokens, self.positions)
            keys_values = [each[:, self.slot.filled].to(queries) for each in stored]
        attn_out = attention(queries, *keys_values)
        windows.store(self)
        return attn_out

    def _written_with_gradients(self, stored: KeysValues, tokens: QKV) -> tuple[Tensor, list[Tensor]]:
        """Rotated queries, and the filled part of the ring, where the block's own keys and values keep their gradients."""
        (own, filled), keys_values = self.slot, []
        queries, keys = rotate_both(tokens.queries, tokens.keys, self.positions)
        for ring, new in zip(stored, (keys, tokens.values), strict=True):
            ring[:, own] = new.detach()
            parts = (ring[:, filled.start : own.start], new.to(ring.dtype), ring[:, own.stop : filled.stop])
            keys_values.append((torch.cat(parts, dim=1) if new.requires_grad else ring[:, filled]).to(new))
        return queries, keys_values

    def text(self, project: Callable[[Tensor], KeysValues], rows: Tensor | None) -> KeysValues:
        """The keys and values that prefill stored."""
        return self.cache.text[self.layer]


def memory_positions(
    buckets: tuple[int, ...], grid: tuple[int, int], ref_position: float, *, device: torch.device | None = None
) -> Positions:
    """Position ids of the reference's tokens, then of the motion tokens (none without buckets)."""
    ref = grid_positions(torch.full((1,), ref_position, dtype=torch.float64, device=device), *grid)
    if not buckets:
        return ref
    return tuple(torch.cat(ids) for ids in zip(ref, motion_positions(buckets, *grid, device=device), strict=True))
