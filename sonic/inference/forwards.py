"""Schedules the forwards of a rollout on one device: one at a time, or several that share each pass over the transformer blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from sonic.model.dit import AvatarDiT
from sonic.model.trunk_inputs import ForwardRequest
from sonic.parallel.layer_pipeline import PipelineForwards
from sonic.parallel.parallelize import DistributedContext
from sonic.types import Conditions


class Forwards(Protocol):
    """Forwards in flight. Requests of one (cond_index, step) come in the order of their blocks; results in the order of the requests."""

    def accepts(self, request: ForwardRequest) -> bool:
        """Whether there is room for it now."""

    def submit(self, request: ForwardRequest) -> None:
        """Start a forward."""

    def collect(self) -> Sequence[Tensor]:
        """The predictions of the oldest requests in flight, at least one of them; waits for it."""

    def close(self) -> None:
        """Drop what is in flight."""


OpenForwards = Callable[[AvatarDiT, Sequence[Conditions], int], Forwards]  # (model, sets of conditions, sampling steps)


class BatchedForwards:
    """Up to `width` requests go through the blocks together, so that the weights of each block are loaded once for all of them.

    A width of 0 is one request for every sampling step.
    """

    def __init__(
        self, model: AvatarDiT, conditions: Sequence[Conditions], steps: int, *, context: DistributedContext, width: int = 1
    ) -> None:
        self.model, self.width, self.execution = model, width or steps, context.execution
        caches = [model.new_cache(each, steps=steps, execution=self.execution) for each in conditions]
        self.caches = [model.prefill(each, cache, execution=self.execution) for each, cache in zip(conditions, caches, strict=True)]
        self.waiting: list[ForwardRequest] = []

    def accepts(self, request: ForwardRequest) -> bool:
        """A ring serves one request of a pass, because it holds one position of the reference at a time."""
        busy = {(each.cond_index, each.step) for each in self.waiting}
        return len(self.waiting) < self.width and (request.cond_index, request.step) not in busy

    def submit(self, request: ForwardRequest) -> None:
        """It waits for the next pass."""
        self.waiting.append(request)

    @torch.no_grad()
    def collect(self) -> Sequence[Tensor]:
        """The predictions of all that waited, after one pass."""
        requests, self.waiting = self.waiting, []
        model, execution = self.model, self.execution
        reaches = [self._reach(request) for request in requests]
        embedded = [model.embed_block(each.latents, each.timestep, each.inputs, sequence=execution.sequence) for each in requests]
        outputs = execution.run_blocks(model, [inputs for inputs, _ in embedded], reaches)
        predictions = [
            model.unembed(output, summary, self.caches[request.cond_index].grid, sequence=execution.sequence)
            for output, (_, summary), request in zip(outputs, embedded, requests, strict=True)
        ]
        return [prediction.to(requests[0].latents.dtype) for prediction in predictions]

    def close(self) -> None:
        """Nothing is in flight between passes."""
        self.waiting.clear()

    def _reach(self, request: ForwardRequest) -> Callable:
        cache, inputs = self.caches[request.cond_index], request.inputs
        return self.model.block_reach(inputs.span, cache, cache.rings[request.step], ref_position=inputs.ref_position)


def open_forwards(context: DistributedContext) -> OpenForwards:
    """The scheduler for a context: along the layer pipeline where there is one, else on this device."""
    if context.channel is not None:
        return partial(PipelineForwards, context=context)
    offload = context.parallel.offload if context.world.plan == "offload" else None
    return partial(BatchedForwards, context=context, width=offload.inflight if offload else 1)
