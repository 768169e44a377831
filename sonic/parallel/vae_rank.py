"""The autoencoder on a separate rank: the first rank calls it by messages, and its caches between calls stay on its rank.

This leaves the first rank's memory to its layers, and frames are decoded while the first rank runs the next forwards.
"""

from __future__ import annotations

import weakref
from collections import deque
from threading import Lock
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sonic.parallel.channel import BACKWARD, P2PChannel, Shutdown
from sonic.parallel.mesh import World
from sonic.system.heartbeat import waiting_for_others
from sonic.types import MotionLayers
from sonic.vae.motion_vae import Reference

DIRECTIONS = (BACKWARD + 1, BACKWARD + 2)  # tags of these messages; the layer pipeline uses others


class RemoteCall(NamedTuple):
    """A call of a method of the autoencoder, and the numbers of handles to release; an argument that is a number stands for a handle."""

    method: str
    arguments: tuple[Tensor | int | None, ...]
    released: tuple[int, ...]


class Reply(NamedTuple):
    """The reply to a call: its result and the number of the new handle, or `fault`, the message of a ValueError."""

    result: Tensor | MotionLayers | None = None
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
        latents, handle = self._call("reference", picture)
        handle.latents = latents
        return handle

    def encode(self, frames: Tensor, cache: RemoteHandle | None = None) -> tuple[Tensor, RemoteHandle]:
        """Latents of frames, and the cache for the frames that follow. Raises the autoencoder's ValueError for a wrong number of frames."""
        return self._call("encode", frames, cache)

    def decode(self, latents: Tensor, *known: RemoteHandle | None) -> tuple[Tensor | MotionLayers, RemoteHandle]:
        """Frames or motion of latents, and the cache for the latents that follow; `known` are the handles of decode's other arguments."""
        return self._call("decode", latents, *known)

    def _call(self, method: str, *arguments: Tensor | RemoteHandle | None) -> tuple[Tensor | MotionLayers, RemoteHandle]:
        sent = tuple(each.number if isinstance(each, RemoteHandle) else each for each in arguments)
        with waiting_for_others(), self.lock:
            released = tuple(self.released.popleft() for _ in range(len(self.released)))
            self.channel.send_next(RemoteCall(method, sent, released))
            reply = self.channel.recv_last()
            self.channel.flush()  # the reply shows that the call has arrived
        if reply.fault:
            raise ValueError(reply.fault)
        handle = RemoteHandle(reply.handle)
        weakref.finalize(handle, self.released.append, handle.number).atexit = False
        return reply.result, handle


@torch.no_grad()
def serve_vae(autoencoder: nn.Module, channel: P2PChannel) -> None:
    """The loop of the autoencoder's rank: answer calls until the first rank shuts it down."""
    handles: dict[int, Any] = {}
    number = 0
    while not isinstance(call := channel.recv_previous(), Shutdown):
        channel.flush()  # the call shows that the last reply has arrived
        for each in call.released:
            handles.pop(each, None)
        number += 1
        channel.send_first(_reply(autoencoder, call, handles, number=number))
        del call
    channel.flush()


def make_vae_channel(world: World) -> P2PChannel:
    """The channel between the first rank of a video and the autoencoder's rank."""
    ranks = dist.get_process_group_ranks(world.group("layers"))
    return P2PChannel([ranks[0], ranks[-1]], world.device, DIRECTIONS, lanes=world.lanes)


def _reply(autoencoder: nn.Module, call: RemoteCall, handles: dict[int, Any], *, number: int) -> Reply:
    """Run a call. The value for later calls is stored in `handles`; a ValueError is to be raised on the first rank."""
    arguments = [handles[each] if isinstance(each, int) else each for each in call.arguments]
    try:
        found = getattr(autoencoder, call.method)(*arguments)
    except ValueError as error:
        return Reply(fault=str(error))
    result, handles[number] = (found.latents, found) if isinstance(found, Reference) else found
    return Reply(result, number)
