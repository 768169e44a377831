"""Schedules the forwards of a rollout: here one at a time, or several that share each pass over the transformer blocks.

Requests with the same (cond_index, step) must be submitted in the order of their blocks; predictions are returned in the order of
submission.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sonic.model.dit import AvatarDiT
from sonic.model.execution import ForwardRequest
from sonic.parallel.context import DistributedContext
from sonic.parallel.layer_pipeline import PipelineForwards
from sonic.types import Conditions


class BatchedForwards:
    """Runs up to `width` requests through the transformer blocks together, so that the weights of each block are loaded once for all.

    A width of 0 means one request per sampling step.
    """

    def __init__(
        self, model: AvatarDiT, conditions: Sequence[Conditions], steps: int, *, context: DistributedContext, width: int = 1
    ) -> None:
        self.model, self.width, self.execution = model, width or steps, context.execution
        caches = [model.new_cache(each, steps=steps, execution=self.execution) for each in conditions]
        self.caches = [model.prefill(each, cache, execution=self.execution) for each, cache in zip(conditions, caches, strict=True)]
        self.waiting: list[ForwardRequest] = []

    def accepts(self, request: ForwardRequest) -> bool:
        """Whether there is room in the next pass. A KV ring can serve one request per pass, because it holds one reference position."""
        busy = {(each.cond_index, each.step) for each in self.waiting}
        return len(self.waiting) < self.width and (request.cond_index, request.step) not in busy

    def submit(self, request: ForwardRequest) -> None:
        """Queue the request for the next pass."""
        self.waiting.append(request)

    @torch.no_grad()
    def collect(self) -> Sequence[Tensor]:
        """Run one pass and return the predictions of all queued requests."""
        requests, self.waiting = self.waiting, []
        model, execution = self.model, self.execution
        contexts = [self._block_context(request) for request in requests]
        embedded = [model.embed_block(each.latents, each.timestep, each.inputs, sequence=execution.sequence) for each in requests]
        outputs = execution.run_blocks(model, embedded, contexts)
        predictions = [
            model.unembed(output, self.caches[request.cond_index].grid, sequence=execution.sequence)
            for output, request in zip(outputs, requests, strict=True)
        ]
        return [prediction.to(requests[0].latents.dtype) for prediction in predictions]

    def close(self) -> None:
        """Discard the queued requests."""
        self.waiting.clear()

    def _block_context(self, request: ForwardRequest) -> Callable:
        cache, inputs = self.caches[request.cond_index], request.inputs
        return self.model.block_context(inputs.span, cache, cache.rings[request.step], ref_position=inputs.ref_position)


Forwards = BatchedForwards | PipelineForwards


def open_forwards(context: DistributedContext, model: AvatarDiT, conditions: Sequence[Conditions], *, steps: int) -> Forwards:
    """The scheduler of a rollout with these conditions, by cond_index: the layer pipeline if there is one, else batches on this device."""
    if context.channel is not None:
        return PipelineForwards(model, conditions, steps, context=context)
    width = context.parallel.offload.inflight if context.world.plan == "offload" else 1
    return BatchedForwards(model, conditions, steps, context=context, width=width)
