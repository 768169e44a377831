"""A rollout by several ranks: the first rank does what a single one would do, the others repeat it until they are shut down."""

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
    """What the other ranks must know to make the same rollout: blocks over `spans`, or one clip of so many latent frames."""

    conditions: Conditions
    sampler: SamplerConfig
    unguided: Conditions | None
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
    """`rollout` by all ranks that share the model; stops on all ranks when the consumer stops."""
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
            except BaseException:  # the consumer stopped; after an error inside the rollout nobody listens, so nothing is sent
                if context.rollouts == begun:  # else this is closed so late that the others are in the next rollout already
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
    """`sample_clip` by all ranks that share the model."""
    if context.world.stages > 1:
        raise ValueError(f"parallel=pipeline: {CLIPS_WAIT}")
    if not context.alone:
        _broadcast(context, _request(conditions, sampling, latent_frames=latent_frames))
    return sample_clip(model, conditions, latent_frames, sampling=sampling, execution=context.execution)


def worker_loop(model: AvatarDiT, context: DistributedContext, dtype: torch.dtype) -> None:
    """What every rank but the leading one does until it is shut down."""
    if context.world.stage:
        stage_loop(model, context, dtype=dtype)
        return
    message = _broadcast(context)
    while message is not None:
        message = _repeat(model, context, message) if isinstance(message, RolloutRequest) else _broadcast(context)
    _stop_stages(context)


def _repeat(model: AvatarDiT, context: DistributedContext, request: RolloutRequest) -> RolloutRequest | bool | None:
    """A whole clip, or blocks for as long as the leading rank continues; returns the message after them."""
    rng = torch.Generator()
    rng.set_state(request.random_state)
    conditions, unguided = (each and _to_device(each, context.world.device) for each in (request.conditions, request.unguided))
    sampling = Sampling(request.sampler, NoiseSource(rng), unguided)
    if request.latent_frames:
        sample_clip(model, conditions, request.latent_frames, sampling=sampling, execution=context.execution)
        return _broadcast(context)
    with closing(rollout(model, conditions, request.spans, sampling=sampling, context=context)) as blocks:
        while (message := _broadcast(context)) is CONTINUE and next(blocks, None) is not None:
            pass
    return message


def _request(conditions: Conditions, sampling: Sampling, **length: object) -> RolloutRequest:
    """The request to repeat a rollout of that length."""
    return RolloutRequest(conditions, sampling.sampler, sampling.unguided, sampling.source.generator.get_state(), **length)


def shutdown(context: DistributedContext) -> None:
    """End the loops of the other ranks; a second call does nothing."""
    if context.closed:
        return
    context.closed = True
    if not context.alone:
        _broadcast(context)
    _stop_stages(context)
    if context.world.vae_rank:
        stop_vae(context.vae_channel)


def _broadcast(context: DistributedContext, message: RolloutRequest | bool | None = None) -> RolloutRequest | bool | None:
    """From the leading rank to those that repeat what it does: a rollout, whether to go on to the next block; None is the end."""
    if isinstance(message, RolloutRequest):
        context.rollouts += 1
        message = message._replace(conditions=lean(message.conditions), unguided=message.unguided and lean(message.unguided))
    messages = [message]
    dist.broadcast_object_list(messages, group_src=0, group=context.world.cast, device=CPU)
    return messages[0]


def lean(conditions: Conditions) -> Conditions:
    """The same in host memory, to be sent: a view without the rest of its storage, which would be sent with it."""
    return replace(conditions, **{name: _lean(value) for name, value in vars(conditions).items() if value is not None})


def _lean(tensor: Tensor) -> Tensor:
    once = without_repeats(tensor)
    if once.device == CPU and once.untyped_storage().nbytes() <= once.nbytes:
        return tensor  # itself, so that what both conditions have in common goes once
    return once.to(CPU, copy=True).expand(tensor.shape)


def _to_device(conditions: Conditions, device: torch.device) -> Conditions:
    """What was sent, on the device of this rank; speech features, which may be gigabytes, stay in host memory until they are encoded."""
    tensors = {name: value.to(device) for name, value in vars(conditions).items() if value is not None and name != "audio"}
    return replace(conditions, **tensors)


def _stop_stages(context: DistributedContext) -> None:
    if context.channel is not None:
        stop_stages(context.channel)
