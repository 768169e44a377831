"""Denoises a clip on several ranks: the first rank sends each request to the others, which run the same steps until shutdown."""

from __future__ import annotations

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


def distributed_denoise(unet: SvdUNet, request: ClipRequest, context: DistributedContext, *, on_step: OnClipStep | None = None) -> Tensor:
    """`denoise_clip` on all ranks that share the windows. The same bits as on one rank, for clips of a window or more."""
    if context.world.rollout_group is not None:
        context.rollouts += 1
        send(context, request)
    return _denoise(unet, request, context, on_step=on_step)


def serve_clips(unet: SvdUNet, context: DistributedContext) -> None:
    """Repeat every clip of the leading rank until it shuts this rank down."""
    device = context.world.device
    while isinstance(message := receive(context), ClipRequest):
        conditions = message.conditions.to(device)
        _denoise(unet, message._replace(conditions=conditions, noise=message.noise.to(device)), context)
    assert message is Command.SHUT_DOWN, message


def _denoise(unet: SvdUNet, request: ClipRequest, context: DistributedContext, *, on_step: OnClipStep | None = None) -> Tensor:
    return denoise_clip(
        unet, request.conditions, request.noise, sampling=request.sampling, spread=spread_of(context.world), on_step=on_step
    )
