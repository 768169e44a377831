"""Runs a rollout on several ranks: the first rank sends each request to the others, which run the same forwards until shutdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sonic.config import SamplerConfig
from sonic.inference.rollout import NoiseSource, Sampling, rollout, sample_clip
from sonic.model.dit import AvatarDiT
from sonic.parallel.context import DistributedContext
from sonic.parallel.layer_pipeline import stage_loop, stop_stages
from sonic.parallel.vae_rank import stop_vae, without_repeats
from sonic.planner.plans import CLIPS_WAIT
from sonic.types import BlockSpan, Conditions, LatentBlock

CPU = torch.device("cpu")
CONTINUE, STOP = True, False


class RolloutRequest(NamedTuple):
    """The message that starts the same rollout on the other ranks: blocks over `spans`, or one clip when `latent_frames` is not 0."""

    conditions: Conditions
    sampler: SamplerConfig
    unconditional: Conditions | None
    random_state: Tensor
    spans: Sequence[BlockSpan] = ()
    latent_frames: int = 0


def distributed_rollout(
    model: AvatarDiT,
    conditions: Conditions,
    spans: Iterable[BlockSpan],
    *,
    sampling: Sampling,
    context: DistributedContext,
) -> Iterator[LatentBlock]:
    """`rollout` on all ranks that share the model; when the consumer of the iterator stops, the rollout stops on all ranks.

    Raises ValueError when the noise or the reference positions are overridden, because the other ranks cannot repeat them.
    """
    if context.alone:
        yield from rollout(model, conditions, spans, sampling=sampling, context=context)
        return
    source = sampling.source
    if source.noise or source.ref_positions:
        raise ValueError("video.compat=upstream draws what other ranks cannot know; use parallel=single or parallel=pipeline with it")
    spans = list(spans)
    _broadcast(context, _request(conditions, sampling, spans=spans))
    begun = context.rollouts
    with closing(rollout(model, conditions, spans, sampling=sampling, context=context)) as blocks:
        while _broadcast(context, CONTINUE) and (block := next(blocks, None)) is not None:
            try:
                yield block
            except BaseException:  # the consumer stopped; an error inside `rollout` does not come here
                if context.rollouts == begun:  # else the other ranks are in a later rollout already
                    _broadcast(context, STOP)
                raise


def distributed_clip(
    model: AvatarDiT,
    conditions: Conditions,
    latent_frames: int,
    *,
    sampling: Sampling,
    context: DistributedContext,
) -> Tensor:
    """`sample_clip` on all ranks that share the model. Raises ValueError under a layer pipeline, which cannot make clips."""
    if context.world.stages > 1:
        raise ValueError(f"parallel=pipeline: {CLIPS_WAIT}")
    if not context.alone:
        _broadcast(context, _request(conditions, sampling, latent_frames=latent_frames))
    return sample_clip(model, conditions, latent_frames, sampling=sampling, execution=context.execution)


def worker_loop(model: AvatarDiT, context: DistributedContext, dtype: torch.dtype) -> None:
    """Serve the leading rank until it sends the shutdown: run the stage of this rank, or repeat every rollout."""
    if context.world.stage:
        stage_loop(model, context, dtype=dtype)
        return
    message = _broadcast(context)
    while message is not None:
        message = _repeat(model, context, message) if isinstance(message, RolloutRequest) else _broadcast(context)
    _stop_stages(context)


def _repeat(model: AvatarDiT, context: DistributedContext, request: RolloutRequest) -> RolloutRequest | bool | None:
    """Repeat one rollout: a whole clip, or blocks until the leading rank stops. Returns the last message."""
    rng = torch.Generator()
    rng.set_state(request.random_state)
    conditions, unconditional = (each and _to_device(each, context.world.device) for each in (request.conditions, request.unconditional))
    sampling = Sampling(request.sampler, NoiseSource(rng), unconditional)
    if request.latent_frames:
        sample_clip(model, conditions, request.latent_frames, sampling=sampling, execution=context.execution)
        return _broadcast(context)
    with closing(rollout(model, conditions, request.spans, sampling=sampling, context=context)) as blocks:
        while (message := _broadcast(context)) is CONTINUE and next(blocks, None) is not None:
            pass
    return message


def _request(conditions: Conditions, sampling: Sampling, **length: object) -> RolloutRequest:
    """The request for the other ranks, with the state of the random generator before the rollout."""
    return RolloutRequest(conditions, sampling.sampler, sampling.unconditional, sampling.source.generator.get_state(), **length)


def shutdown(context: DistributedContext) -> None:
    """End the worker loops of the other ranks; a second call does nothing."""
    if context.closed:
        return
    context.closed = True
    if not context.alone:
        _broadcast(context)
    _stop_stages(context)
    if context.world.vae_rank:
        stop_vae(context.vae_channel)


def _broadcast(context: DistributedContext, message: RolloutRequest | bool | None = None) -> RolloutRequest | bool | None:
    """Broadcast a message from the leading rank to its workers: a rollout, CONTINUE, STOP, or None for shutdown. Returns the message."""
    if isinstance(message, RolloutRequest):
        context.rollouts += 1
        message = message._replace(
            conditions=compact(message.conditions), unconditional=message.unconditional and compact(message.unconditional)
        )
    messages = [message]
    dist.broadcast_object_list(messages, group_src=0, group=context.world.rollout_group, device=CPU)
    return messages[0]


def compact(conditions: Conditions) -> Conditions:
    """The conditions in host memory, ready to be sent. Views are copied, because a view is sent with the whole storage behind it."""
    return replace(conditions, **{name: _compact(value) for name, value in vars(conditions).items() if value is not None})


def _compact(tensor: Tensor) -> Tensor:
    once = without_repeats(tensor)
    if once.device == CPU and once.untyped_storage().nbytes() <= once.nbytes:
        return tensor  # not copied, so that a tensor in both sets of conditions is sent once
    return once.to(CPU, copy=True).expand(tensor.shape)


def _to_device(conditions: Conditions, device: torch.device) -> Conditions:
    """Received conditions on the device of this rank. Speech features may take gigabytes and stay in host memory until they are encoded."""
    tensors = {name: value.to(device) for name, value in vars(conditions).items() if value is not None and name != "audio"}
    return replace(conditions, **tensors)


def _stop_stages(context: DistributedContext) -> None:
    if context.channel is not None:
        stop_stages(context.channel)
