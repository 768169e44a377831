"""Denoises a clip on several ranks: the first rank sends each request to the others, which run the same steps until shutdown."""

from __future__ import annotations

from contextlib import suppress
from typing import NamedTuple

from torch import Tensor

from sonic.inference.denoise_windows import ClipConditions, OnClipStep, WindowSampling, denoise_clip
from sonic.inference.distributed_rollout import Command, receive, send
from sonic.model.svd_unet import SvdUNet
from sonic.parallel.context import DistributedContext
from sonic.parallel.parallelize_unet import spread_of


class ClipRequest(NamedTuple):
    """The message that starts the same clip on the other ranks."""

    conditions: ClipConditions
    noise: Tensor
    sampling: WindowSampling
    reports: bool = False  # whether the leading rank's caller is called after every step, and may stop the clip there


class StoppedClip(Exception):
    """The leading rank's caller has stopped the clip that this rank evaluates windows of."""


def distributed_denoise(unet: SvdUNet, request: ClipRequest, context: DistributedContext, *, on_step: OnClipStep | None = None) -> Tensor:
    """`denoise_clip` on all ranks that share the windows. The same bits as on one rank, for clips of a window or more."""
    if context.world.rollout_group is not None:
        context.rollouts += 1
        send(context, request._replace(reports=on_step is not None))
        on_step = on_step and _with_commands(on_step, context)
    return _denoise(unet, request, context, on_step=on_step)


def serve_clips(unet: SvdUNet, context: DistributedContext) -> None:
    """Repeat every clip of the leading rank until it shuts this rank down."""
    device = context.world.device
    while isinstance(message := receive(context), ClipRequest):
        conditions = message.conditions.to(device)
        request = message._replace(conditions=conditions, noise=message.noise.to(device))
        with suppress(StoppedClip):
            _denoise(unet, request, context, on_step=_as_commanded(context) if message.reports else None)
    assert message is Command.SHUT_DOWN, message


def _denoise(unet: SvdUNet, request: ClipRequest, context: DistributedContext, *, on_step: OnClipStep | None = None) -> Tensor:
    return denoise_clip(
        unet, request.conditions, request.noise, sampling=request.sampling, spread=spread_of(context.world), on_step=on_step
    )


def _with_commands(on_step: OnClipStep, context: DistributedContext) -> OnClipStep:
    """`on_step`, after which the other ranks are sent the command to go on, or to stop when it raises."""

    def reported(step: int, timestep: float, latents: Tensor) -> None:
        try:
            on_step(step, timestep, latents)
        except BaseException:
            send(context, Command.STOP_ROLLOUT)
            raise
        send(context, Command.NEXT_BLOCK)

    return reported


def _as_commanded(context: DistributedContext) -> OnClipStep:
    """Go on or stop after a step, as the leading rank commands; raises StoppedClip."""

    def wait(*_: object) -> None:
        if receive(context) is Command.STOP_ROLLOUT:
            raise StoppedClip

    return wait
