"""What a rollout remembers: keys and values of the memory and of the last blocks, as values that are handed in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sonic.config import ModelConfig
from sonic.model.attention import Attention, KeysValues, Projected
from sonic.model.embed import Places, Rotation, grid_places, motion_places, rotate, rotation


@dataclass
class KVRing:
    """One sampling step's buffers: per layer keys and values [B, memory + window · block, heads, d], memory first.

    `window` is the number of blocks it holds. Blocks are written in turn; once the ring is full a new block replaces the
    oldest. Keys carry their absolute positions, so their order in the ring does not matter.
    """

    keys: dict[int, Tensor]
    values: dict[int, Tensor]
    memory_tokens: int
    block_tokens: int
    window: int
    origin: int | None = None
    newest: int | None = None
    ref_position: int | None = None

    def rewind(self) -> None:
        """Forget the blocks; the memory stays."""
        self.origin = self.newest = None

    def begin(self, index: int) -> tuple[int, int, int]:
        """Make room for block `index`: first and last token of its slot, and how far the ring is filled with it.

        The newest block may be written again; anything else must be its successor.
        """
        self.origin = index if self.origin is None else self.origin
        if self.newest is not None and index not in (self.newest, self.newest + 1):
            raise ValueError(f"block {index} cannot follow block {self.newest}: a ring is written in order; start a new cache to jump")
        self.newest = index
        count = index - self.origin
        first = self.memory_tokens + count % self.window * self.block_tokens
        return first, first + self.block_tokens, self.memory_tokens + min(count + 1, self.window) * self.block_tokens


class Held(NamedTuple):
    """What of a model's cache is kept here: these layers, and this many heads of each."""

    layers: Sequence[int]
    heads: int


@dataclass
class KVCache:
    """Memory keys without rotation (the reference moves along), the prompt's keys and values, and a ring per sampling step.

    `device` is where all this lies, `token_device` where it is used.
    """

    rings: list[KVRing]
    grid: tuple[int, int]
    buckets: tuple[int, ...]
    memory_keys: dict[int, Tensor]
    text: dict[int, KeysValues]
    head_dim: int
    device: torch.device
    token_device: torch.device

    @classmethod
    def allocate(cls, config: ModelConfig, shape: tuple[int, int, int], held: Held, *, steps: int, motion: bool, like: Tensor) -> KVCache:
        """Empty buffers for `steps` sampling steps over [batch, rows, columns] of patches; dtype and device as `like`."""
        (batch, *grid), rollout = shape, config.rollout
        buckets = tuple(config.motion.buckets) if motion else ()
        size = grid[0] * grid[1]
        memory_tokens = size + (len(motion_places(buckets, *grid)[0]) if motion else 0)
        block_tokens = rollout.block_frames * size
        head_dim = config.trunk.hidden_dim // config.trunk.num_heads
        empty = lambda length: {layer: like.new_zeros(batch, length, held.heads, head_dim) for layer in held.layers}  # noqa: E731
        length = memory_tokens + rollout.window_blocks * block_tokens
        rings = [KVRing(empty(length), empty(length), memory_tokens, block_tokens, rollout.window_blocks) for _ in range(steps)]
        return cls(rings, tuple(grid), buckets, empty(memory_tokens), {}, head_dim, like.device, like.device)

    def memory_places(self, ref_position: float, device: torch.device) -> Places:
        """Ids of the memory tokens with the reference at the given time id."""
        return memory_places(self.buckets, self.grid, ref_position, device=device)

    def place_reference(self, ring: KVRing, ref_position: int) -> None:
        """Rotate the memory's keys in the ring's buffers for a reference at `ref_position`; only what moved is rewritten."""
        if ring.ref_position == ref_position:
            return
        moved = ring.memory_tokens if ring.ref_position is None else self.grid[0] * self.grid[1]
        places = tuple(ids[:moved] for ids in self.memory_places(ref_position, self.device))
        turn = rotation(places, self.head_dim)
        for layer, raw in self.memory_keys.items():
            ring.keys[layer][:, :moved] = rotate(raw[:, :moved], turn)
        ring.ref_position = ref_position


@dataclass(frozen=True)
class FillMemory:
    """Prefill's view of a layer: memory sees itself and is written down."""

    cache: KVCache
    layer: int
    places: Rotation

    def attend(self, attention: Attention, tokens: Projected) -> Tensor:
        """Attention among the memory tokens; their keys are kept without rotation."""
        query, key, value = tokens
        self.cache.memory_keys[self.layer].copy_(key)
        for ring in self.cache.rings:
            ring.values[self.layer][:, : ring.memory_tokens] = value
        return attention(rotate(query, self.places), rotate(key, self.places), value)

    def text(self, project: Callable[[Tensor], KeysValues], rows: Tensor) -> KeysValues:
        """Keys and values of the prompt, kept for every later block."""
        self.cache.text[self.layer] = project(rows)
        return self.cache.text[self.layer]


@dataclass(frozen=True)
class RingView:
    """One block's view of a layer: itself, the blocks still in the ring, the memory. Gradients reach the block alone."""

    cache: KVCache
    ring: KVRing
    layer: int
    slot: tuple[int, int, int]
    places: Rotation

    def attend(self, attention: Attention, tokens: Projected) -> Tensor:
        """Write the block's keys and values into its slot and attend to all that is filled."""
        first, last, filled = self.slot
        seen = []
        for buffer, mine in ((self.ring.keys, rotate(tokens.keys, self.places)), (self.ring.values, tokens.values)):
            held = buffer[self.layer]
            held[:, first:last] = mine.detach()
            live = (held[:, :first], mine.to(held.dtype), held[:, last:filled])
            seen.append((torch.cat(live, dim=1) if mine.requires_grad else held[:, :filled]).to(mine, non_blocking=True))
        return attention(rotate(tokens.queries, self.places), *seen)

    def text(self, project: Callable[[Tensor], KeysValues], rows: Tensor | None) -> KeysValues:
        """What prefill wrote down."""
        return self.cache.text[self.layer]


def memory_places(buckets: tuple[int, ...], grid: tuple[int, int], ref_position: float, *, device: torch.device | None = None) -> Places:
    """Ids of the reference's tokens, then of the motion tokens (none without buckets)."""
    ref = grid_places(torch.tensor([ref_position], dtype=torch.float64, device=device), *grid)
    if not buckets:
        return ref
    return tuple(torch.cat(ids) for ids in zip(ref, motion_places(buckets, *grid, device=device), strict=True))
