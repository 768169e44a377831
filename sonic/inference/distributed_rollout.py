"""Runs a rollout on several ranks: the first rank sends each request to the others, which run the same forwards until shutdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from enum import Enum, auto
from typing import NamedTuple

import torch
from torch import Tensor

from sonic.config import SamplerConfig
from sonic.geometry import BlockSpan
from sonic.inference.rollout import NoiseSource, Sampling, rollout, sample_clip
from sonic.model.dit import AvatarDiT
from sonic.parallel.channel import broadcast
from sonic.parallel.context import DistributedContext
from sonic.parallel.layer_pipeline import stage_loop
from sonic.planner.plans import CLIPS_WAIT
from sonic.types import Conditions, LatentBlock


class Command(Enum):
    """What the leading rank tells its workers about the rollout that runs."""

    NEXT_BLOCK = auto()
    STOP_ROLLOUT = auto()
    SHUT_DOWN = auto()


class RolloutRequest(NamedTuple):
    """The message that starts the same rollout on the other ranks: blocks over `spans`, or one clip when `latent_frames` is not 0.

    `compiled` says whether the transformer runs compiled.
    """

    conditions: Conditions
    sampler: SamplerConfig
    unconditional: Conditions | None
    random_state: Tensor
    spans: Sequence[BlockSpan] = ()
    latent_frames: int = 0
    compiled: bool = False


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
    if context.world.rollout_group is None:
        yield from rollout(model, conditions, spans, sampling=sampling, context=context)
        return
    source = sampling.source
    if source.noise or source.ref_positions:
        raise ValueError("video.compat=upstream draws what other ranks cannot know; use parallel=single or parallel=pipeline with it")
    spans = list(spans)
    _start_others(context, conditions, sampling, spans=spans, compiled=model.compiled)
    begun = context.rollouts
    with closing(rollout(model, conditions, spans, sampling=sampling, context=context)) as blocks:
        while True:
            send(context, Command.NEXT_BLOCK)
            if (block := next(blocks, None)) is None:
                return
            try:
                yield block
            except BaseException:  # the consumer stopped; an error inside `rollout` does not come here
                if context.rollouts == begun:  # else the other ranks are in a later rollout already
                    send(context, Command.STOP_ROLLOUT)
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
    if context.world.rollout_group is not None:
        _start_others(context, conditions, sampling, latent_frames=latent_frames, compiled=model.compiled)
    return sample_clip(model, conditions, latent_frames, sampling=sampling, execution=context.execution)


def worker_loop(model: AvatarDiT, context: DistributedContext, dtype: torch.dtype) -> None:
    """Serve the leading rank until it shuts this rank down.

    The first stage of a pipeline, and every rank of the other plans, repeats whole rollouts, because its ranks share the tokens or the
    weights of each forward. A later stage only runs its layers, for the forwards that the stage before it sends.
    """
    if context.world.stage:
        stage_loop(model, context, dtype=dtype)
    else:
        _repeat_rollouts(model, context)


def shutdown(context: DistributedContext) -> None:
    """End the worker loops of the other ranks; a second call does nothing."""
    if context.closed:
        return
    context.closed = True
    if context.world.rollout_group is not None:
        send(context, Command.SHUT_DOWN)
    for channel in (context.channel, context.vae_channel):
        if channel is not None:
            channel.shut_down()


def _repeat_rollouts(model: AvatarDiT, context: DistributedContext) -> None:
    """Repeat every rollout of the leading rank."""
    message = receive(context)
    while message is not Command.SHUT_DOWN:
        message = _repeat(model, context, message) if isinstance(message, RolloutRequest) else receive(context)
    if context.channel is not None:
        context.channel.shut_down()


def _repeat(model: AvatarDiT, context: DistributedContext, request: RolloutRequest) -> RolloutRequest | Command:
    """Repeat one rollout: a whole clip, or blocks until the leading rank stops. Returns the message after it."""
    rng = torch.Generator()
    rng.set_state(request.random_state)
    conditions, unconditional = (each and _to_device(each, context.world.device) for each in (request.conditions, request.unconditional))
    sampling, model.compiled = Sampling(request.sampler, NoiseSource(rng), unconditional), request.compiled
    if request.latent_frames:
        sample_clip(model, conditions, request.latent_frames, sampling=sampling, execution=context.execution)
        return receive(context)
    with closing(rollout(model, conditions, request.spans, sampling=sampling, context=context)) as blocks:
        while (message := receive(context)) is Command.NEXT_BLOCK and next(blocks, None) is not None:
            pass
    return message


def _start_others(
    context: DistributedContext,
    conditions: Conditions,
    sampling: Sampling,
    *,
    spans: Sequence[BlockSpan] = (),
    latent_frames: int = 0,
    compiled: bool = False,
) -> None:
    """Start a rollout on the other ranks, with the state of the random generator before it."""
    state = sampling.source.generator.get_state()
    context.rollouts += 1
    send(context, RolloutRequest(conditions, sampling.sampler, sampling.unconditional, state, spans, latent_frames, compiled))


def send(context: DistributedContext, message: RolloutRequest | Command) -> None:
    """Send a message from the leading rank to its workers."""
    broadcast(message, context.world.rollout_group)


def receive(context: DistributedContext) -> RolloutRequest | Command:
    """The next message of the leading rank, which may take any time to come."""
    return broadcast(None, context.world.rollout_group)


def _to_device(conditions: Conditions, device: torch.device) -> Conditions:
    """Received conditions on the device of this rank. Speech features may take gigabytes and stay in host memory until they are encoded."""
    tensors = {name: value.to(device) for name, value in vars(conditions).items() if value is not None and name != "audio"}
    return replace(conditions, **tensors)
