"""The autoencoder on a separate rank: the first rank calls it by messages, and its caches between calls stay on its rank.

This leaves the first rank's memory to its layers, and frames are decoded while the first rank runs the next forwards.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from threading import Lock
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sonic.parallel.channel import BACKWARD, P2PChannel
from sonic.parallel.mesh import World
from sonic.types import MotionLayers
from sonic.vae.motion_vae import Reference

DIRECTIONS = (BACKWARD + 1, BACKWARD + 2)  # tags of these messages; the layer pipeline uses others


class TensorLayout(NamedTuple):
    """The memory layout of a tensor: its axes from the largest stride to the smallest, and its shape. Expanded axes are sent once."""

    order: tuple[int, ...]
    shape: tuple[int, ...]


class RemoteCall(NamedTuple):
    """A call of the autoencoder: the method ("" ends the loop), for each argument a tensor's layout, a handle's number or None, and
    the numbers of handles to release."""

    method: str
    arguments: tuple[TensorLayout | int | None, ...] = ()
    released: tuple[int, ...] = ()


class Reply(NamedTuple):
    """The reply to a call: the layouts of the tensors and the number of the new handle, or `fault`, the message of a ValueError."""

    layouts: tuple[TensorLayout, ...] = ()
    handle: int = 0
    fault: str = ""


class RemoteHandle:
    """A value on the autoencoder's rank, by number: a stream's cache, or a portrait's `Reference`, of which `latents` is a copy here."""

    def __init__(self, number: int, latents: Tensor | None = None) -> None:
        self.number, self.latents = number, latents


class RemoteAutoencoder:
    """A stand-in for the autoencoder of another rank: the same methods with the same results, one call at a time."""

    def __init__(self, channel: P2PChannel) -> None:
        self.channel, self.lock = channel, Lock()
        self.released: deque[int] = deque()  # handles to release, not yet sent to the other rank

    def reference(self, picture: Tensor) -> RemoteHandle:
        """What the autoencoder computes once from a portrait, as a handle."""
        (latents,), number = self._call("reference", picture)
        return self._handle(number, latents)

    def encode(self, frames: Tensor, cache: RemoteHandle | None = None) -> tuple[Tensor, RemoteHandle]:
        """Latents of frames, and the cache for the frames that follow. Raises the autoencoder's ValueError for a wrong number of frames."""
        (latents,), number = self._call("encode", frames, cache)
        return latents, self._handle(number)

    def decode(self, latents: Tensor, *known: RemoteHandle | None) -> tuple[Tensor | MotionLayers, RemoteHandle]:
        """Frames or motion of latents, and the cache for the latents that follow; `known` are the handles of decode's other arguments."""
        made, number = self._call("decode", latents, *known)
        return made[0] if len(made) == 1 else MotionLayers(*made), self._handle(number)

    def _handle(self, number: int, latents: Tensor | None = None) -> RemoteHandle:
        handles = RemoteHandle(number, latents)
        weakref.finalize(handles, self.released.append, number).atexit = False
        return handles

    def _call(self, method: str, *arguments: Tensor | RemoteHandle | None) -> tuple[list[Tensor], int]:
        layouts, tensors = _packed([each for each in arguments if isinstance(each, Tensor)])
        rest = iter(layouts)
        sent = tuple(next(rest) if isinstance(each, Tensor) else each and each.number for each in arguments)
        with self.lock:
            released = tuple(self.released.popleft() for _ in range(len(self.released)))
            self.channel.send_next(RemoteCall(method, sent, released), tensors)
            reply, made = self.channel.recv_last()
            self.channel.flush()  # the reply shows that the call has arrived
        if reply.fault:
            raise ValueError(reply.fault)
        return _restored(reply.layouts, made), reply.handle


@torch.no_grad()
def serve_vae(autoencoder: nn.Module, channel: P2PChannel) -> None:
    """The loop of the autoencoder's rank: answer calls until the first rank calls `stop_vae`."""
    handles: dict[int, Any] = {}
    number = 0
    while True:
        call, tensors = channel.recv_previous()
        channel.flush()  # the next call shows that the last reply has arrived
        if not call.method:
            return
        for each in call.released:
            handles.pop(each, None)
        number += 1
        reply, made = _compute_reply(autoencoder, call, tensors, handles=handles, number=number)
        channel.send_first(reply, made)
        del tensors, made


def stop_vae(channel: P2PChannel) -> None:
    """End the loop of the autoencoder's rank; called by the first rank."""
    channel.send_next(RemoteCall(""), ())
    channel.flush()


def make_vae_channel(world: World) -> P2PChannel:
    """The channel between the first rank of a video and the autoencoder's rank."""
    ranks = dist.get_process_group_ranks(world.group("layers"))
    return P2PChannel([ranks[0], ranks[-1]], world.device, DIRECTIONS, lanes=world.lanes)


def without_repeats(tensor: Tensor) -> Tensor:
    """A view of the tensor in which every expanded axis has one entry."""
    return tensor[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())]


def _compute_reply(
    autoencoder: nn.Module, call: RemoteCall, tensors: Sequence[Tensor], *, handles: dict[int, Any], number: int
) -> tuple[Reply, list[Tensor]]:
    """Run a call and give its reply and the tensors with it. The value for later calls is stored in `handles`; a ValueError becomes the
    reply's `fault`, to be raised on the first rank."""
    sent = iter(_restored([each for each in call.arguments if isinstance(each, TensorLayout)], tensors))
    arguments = [next(sent) if isinstance(each, TensorLayout) else each and handles[each] for each in call.arguments]
    try:
        found = getattr(autoencoder, call.method)(*arguments)
    except ValueError as error:
        return Reply(fault=str(error)), []
    made, handles[number] = (found.latents, found) if isinstance(found, Reference) else found
    layouts, parts = _packed(list(vars(made).values()) if isinstance(made, MotionLayers) else [made])
    return Reply(layouts, number), parts


def _packed(tensors: Sequence[Tensor]) -> tuple[tuple[TensorLayout, ...], list[Tensor]]:
    """Tensors as they are sent: expanded axes once, elements in the order of memory.

    With the same memory layout on both ranks results are equal to the last bit: the rounding of a convolution may depend on it.
    """
    layouts, parts = [], []
    for tensor in tensors:
        once = without_repeats(tensor)
        order = tuple(sorted(range(once.ndim), key=lambda axis: -once.stride(axis)))  # noqa: B023
        layouts.append(TensorLayout(order, tuple(tensor.shape)))
        parts.append(once.permute(order))
    return tuple(layouts), parts


def _restored(layouts: Sequence[TensorLayout], parts: Sequence[Tensor]) -> list[Tensor]:
    """The tensors of `_packed` with their shapes and memory layouts."""
    back = [sorted(range(len(form.order)), key=form.order.__getitem__) for form in layouts]
    return [part.permute(order).expand(form.shape) for form, order, part in zip(layouts, back, parts, strict=True)]
