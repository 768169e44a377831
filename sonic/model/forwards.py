"""Who runs the forwards of a rollout: one at a time here, or several that share each pass over the layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from sonic.types import Conditions

if TYPE_CHECKING:
    from sonic.model.dit import AvatarDiT, BlockInputs
    from sonic.model.kv_cache import KVCache


class Item(NamedTuple):
    """One forward of one block: noisy latents [B,C,T,H,W] and their timestep, told `told`, at the noise level of ring `ring`."""

    latents: Tensor
    timestep: Tensor
    inputs: BlockInputs
    told: int
    ring: int
    ref_position: int


class Forwards(Protocol):
    """Forwards under way. Items of one (told, ring) come in the order of their blocks; results come in the order of the items."""

    def accepts(self, item: Item) -> bool:
        """Whether there is room for it now."""

    def submit(self, item: Item) -> None:
        """Start a forward."""

    def collect(self) -> Sequence[Tensor]:
        """What the head says of the oldest items under way, at least one of them; waits for it."""

    def close(self) -> None:
        """Give back what is under way."""


OpenForwards = Callable[["AvatarDiT", Sequence[Conditions], int], Forwards]  # (model, what it is told, sampling steps)


class SharedPass:
    """Up to `width` items go through the layers together: each layer's weights are looked at once for all of them."""

    def __init__(self, model: AvatarDiT, told: Sequence[Conditions], caches: Sequence[KVCache], *, width: int) -> None:
        self.model, self.width = model, width
        self.caches = [model.prefill(each, cache) for each, cache in zip(told, caches, strict=True)]
        self.waiting: list[Item] = []

    def accepts(self, item: Item) -> bool:
        """A ring serves one item of a pass, because it knows one place of the reference at a time."""
        busy = {(each.told, each.ring) for each in self.waiting}
        return len(self.waiting) < self.width and (item.told, item.ring) not in busy

    def submit(self, item: Item) -> None:
        """It waits for the next pass."""
        self.waiting.append(item)

    @torch.no_grad()
    def collect(self) -> Sequence[Tensor]:
        """All that waited, after one pass."""
        items, self.waiting = self.waiting, []
        reaches = [self._reach(item) for item in items]
        trips, summaries = zip(*(self.model.depart_block(item.latents, item.timestep, item.inputs) for item in items), strict=True)
        trips = self.model.travel(trips, reaches)
        grids = [self.caches[item.told].grid for item in items]
        return [self.model.arrive(*each).to(items[0].latents.dtype) for each in zip(trips, summaries, grids, strict=True)]

    def close(self) -> None:
        """Nothing is under way between passes."""
        self.waiting.clear()

    def _reach(self, item: Item) -> Callable:
        cache = self.caches[item.told]
        return self.model.block_reach(item.inputs.span, cache, cache.rings[item.ring], ref_position=item.ref_position)


def one_by_one(model: AvatarDiT, told: Sequence[Conditions], steps: int) -> Forwards:
    """Each forward alone."""
    return SharedPass(model, told, [model.new_cache(each, steps=steps) for each in told], width=1)
