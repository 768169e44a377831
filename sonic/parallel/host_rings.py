"""KV rings in host memory: the layer that runs reads its ring in a slot on the device, and that of the next layer is on its way."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from sonic.model.attention import AttentionContext, KeysValues
from sonic.model.embed import rotate
from sonic.model.execution import TrunkInputs
from sonic.model.kv_cache import CachedContext, KVCache, RingWindows
from sonic.system.device_stream import Event, current_stream, stream_for
from sonic.system.heartbeat import heartbeat


class HostRings(RingWindows):
    """Copies the filled part of a ring to one of two slots on the device, and what a block adds to it back to host memory.

    One stream runs all copies in order. So a ring is read after all that was written to it has arrived, and a slot is overwritten after
    its block was copied back, for which that stream waits until the attention has run. The keys of the reference are copied as they are
    before rotation, and rotated on the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, stream_for("KV rings", device)
        self.slots: list[Tensor] = []  # [keys and values, B, M + window · block tokens, heads, d]; the last one is overwritten next
        self.coming: deque[CachedContext] = deque()  # those of this pass whose rings are not on their way, in the order of use
        self.loading: deque[tuple[Tensor, Event]] = deque()  # slots that are on their way, and when they are there
        self.in_use = torch.empty(0)

    def allocated(self, cache: KVCache) -> KVCache:
        """The cache, with its host memory pinned where that matters."""
        cache = super().allocated(cache)
        self.coming.clear()  # an abandoned pass would keep its cache
        buffers = [each for ring in cache.rings[::2] for part in (ring.keys, ring.values) for each in part.values()]
        for each in (*buffers, *cache.ref_keys.values()):
            heartbeat()
            self.stream.pin(each, cache)
        weakref.finalize(cache, self._release).atexit = False  # runs before the memory is unpinned: the last finalizer is the first to run
        return cache

    def run_blocks(
        self, model: nn.Module, inputs: Sequence[TrunkInputs], contexts: Sequence[Callable[[int], AttentionContext]]
    ) -> list[TrunkInputs]:
        """Run every sequence through a block before the next block. Rings are loaded in this order."""
        layers = [layer for layer, block in enumerate(model.blocks) if block is not None]
        order = (context(layer) for layer in layers for context in contexts)
        self.coming = deque(each for each in order if isinstance(each, CachedContext))
        self.loading.clear()
        return model.run_blocks(inputs, contexts)

    def load(self, context: CachedContext) -> KeysValues:
        """The slot with the ring of `context`; begins to load the next one."""
        while self.coming and len(self.loading) < 2:
            self.loading.append(self._fetch(self.coming.popleft()))
        self.in_use, arrived = self.loading.popleft()
        current_stream(self.device).wait(arrived)
        keys, values = self.in_use
        reference = _reference(context)
        keys[:, reference] = rotate(keys[:, reference], context.cache.reference_rotation(context.ref_position))
        return keys, values

    def store(self, context: CachedContext) -> None:
        """Copy the block's keys and values back to host memory."""
        self.stream.wait(current_stream(self.device).record())
        for stored, home in zip(self.in_use, _home(context), strict=True):
            self.stream.copy(home[:, context.slot.own], stored[:, context.slot.own])

    def _fetch(self, context: CachedContext) -> tuple[Tensor, Event]:
        """Begin to load a ring, except for the block's own slot. Gives where it will be, and when."""
        (own, filled), home = context.slot, _home(context)
        if not self.slots or self.slots[0].shape[1:] != home[0].shape:
            self.slots = [home[0].new_empty((2, *home[0].shape), device=self.device) for _ in range(2)]
            self.stream.wait(current_stream(self.device).record())  # the memory may have been in use until now
        self.slots.reverse()
        slot = self.slots[0]
        for part in (slice(filled.start, own.start), slice(own.stop, filled.stop)):
            for target, source in zip(slot, home, strict=True):
                self.stream.copy(target[:, part], source[:, part])
        self.stream.copy(slot[0][:, _reference(context)], context.cache.ref_keys[context.layer])
        return slot, self.stream.record()

    def _release(self) -> None:
        """Wait until host memory is neither read nor written, and free the slots."""
        self.stream.record().synchronize()
        self.slots, self.in_use = [], torch.empty(0)
        self.loading.clear()


def _home(context: CachedContext) -> KeysValues:
    """Keys and values of a ring in one layer, in host memory."""
    return context.ring.keys[context.layer], context.ring.values[context.layer]


def _reference(context: CachedContext) -> slice:
    """Where the tokens of the reference are in a ring."""
    start = context.ring.memory.start
    return slice(start, start + context.cache.ref_keys[context.layer].shape[1])
