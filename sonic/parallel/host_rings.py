"""KV rings in host memory: the layer that runs reads its ring in a slot on the device, and the next one is loaded meanwhile."""

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
    """Loads the filled part of a ring into one of two slots on the device, and copies back what a block adds to it.

    One stream runs all copies in order: a ring is read after what was written to it has come back, and a slot is overwritten after its
    block was copied back, for which the stream waits until the attention has run. The device rotates the keys of the reference.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, stream_for("KV rings", device)
        self.slots: list[Tensor] = []  # [keys and values, B, M + window · block tokens, heads, d]; the last one is overwritten next
        self.coming: deque[CachedContext] = deque()  # of this pass, in the order of use, if their rings are not in `loading` yet
        self.loading: deque[tuple[Tensor, Event]] = deque()  # slots that are being loaded, and when they are
        self.in_use = torch.empty(0)
        self.caches = 0  # allocated so far

    def allocated(self, cache: KVCache) -> KVCache:
        """The cache with its host memory pinned; the slots are freed with the newest one."""
        cache = super().allocated(cache)
        self.coming.clear()  # an abandoned pass would keep its cache
        buffers = [each for ring in cache.rings[::2] for part in (ring.keys, ring.values) for each in part.values()]
        for each in (*buffers, *cache.ref_keys.values()):
            heartbeat()
            self.stream.pin(each, cache)
        self.caches += 1
        weakref.finalize(cache, self._release, self.caches).atexit = False
        return cache

    def run_blocks(
        self, model: nn.Module, inputs: Sequence[TrunkInputs], contexts: Sequence[Callable[[int], AttentionContext]]
    ) -> list[TrunkInputs]:
        """Run every sequence through a block before the next block; rings are loaded in this order."""
        order = (context(layer) for layer, block in enumerate(model.blocks) if block is not None for context in contexts)
        self.coming = deque(each for each in order if isinstance(each, CachedContext))
        self.loading.clear()
        return model.run_blocks(inputs, contexts)

    def load(self, context: CachedContext) -> KeysValues:
        """The slot with the ring of `context`; begins to load the next ring."""
        while self.coming and len(self.loading) < 2:
            self.loading.append(self._fetch(self.coming.popleft()))
        self.in_use, loaded = self.loading.popleft()
        current_stream(self.device).wait(loaded)
        keys, values = self.in_use
        reference = context.cache.reference_in(context.ring)
        keys[:, reference] = rotate(keys[:, reference], context.cache.reference_rotation(context.ref_position))
        return keys, values

    def store(self, context: CachedContext) -> None:
        """Copy the block's keys and values back to host memory."""
        own, home = context.slot.own, (context.ring.keys[context.layer], context.ring.values[context.layer])
        self.stream.wait(current_stream(self.device).record())
        for target, source in zip(home, self.in_use, strict=True):
            self.stream.copy(target[:, own], source[:, own])

    def _fetch(self, context: CachedContext) -> tuple[Tensor, Event]:
        """Begin to load a ring except for the block's slot, its reference before rotation. Gives where it will be, and when."""
        (own, filled), cache, ring, layer = context.slot, context.cache, context.ring, context.layer
        if not self.slots or self.slots[0].shape[1:] != ring.keys[layer].shape:
            self.slots = [ring.keys[layer].new_empty((2, *ring.keys[layer].shape), device=self.device) for _ in range(2)]
            self.stream.wait(current_stream(self.device).record())  # the memory may have been in use until now
        self.slots.reverse()
        for target, source in zip(self.slots[0], (ring.keys[layer], ring.values[layer]), strict=True):
            for part in (slice(filled.start, own.start), slice(own.stop, filled.stop)):
                self.stream.copy(target[:, part], source[:, part])
        self.stream.copy(self.slots[0][0][:, cache.reference_in(ring)], cache.ref_keys[layer])
        return self.slots[0], self.stream.record()

    def _release(self, number: int) -> None:
        """Free the slots when all copies are done, unless a newer cache uses them: one of a video that failed may be freed late."""
        if number < self.caches:
            return
        self.stream.record().synchronize()
        self.slots, self.in_use = [], torch.empty(0)
        self.loading.clear()
