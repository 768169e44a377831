"""Messages between ranks: any picklable value with tensors anywhere inside, from one rank to another or to all ranks of a group."""

from __future__ import annotations

import io
import pickle
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sonic.parallel.parallel_config import MESSAGES
from sonic.system.heartbeat import waiting_for_others

CPU = torch.device("cpu")
HEADER_BYTES = 8192
FORWARD, BACKWARD = 0, 1  # the directions of a channel


class Shutdown(NamedTuple):
    """The message that ends the loop of a rank that serves another one."""


class TensorLayout(NamedTuple):
    """How a tensor lies in memory; an expanded axis has stride 0 and is sent once.

    With the same memory layout on both ranks results are equal to the last bit: the rounding of a convolution may depend on it.
    """

    dtype: torch.dtype
    numel: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class P2PChannel:
    """Point-to-point messages from each rank of a group to the next one, and from the last to the first.

    The group is the stages of a pipeline, or two ranks. A message is a header of fixed size and its tensors. A send returns at once, and
    its buffers are held until it is done; only while MESSAGES others are under way it waits for the oldest of them. The two directions of
    a channel, and those of other channels of the same rank, must not block each other: gloo separates `directions` by tags, NCCL needs a
    process group for each, which is `lanes[direction]`.
    """

    def __init__(
        self,
        ranks: Sequence[int],
        device: torch.device,
        directions: tuple[int, int] = (FORWARD, BACKWARD),
        *,
        lanes: Sequence[dist.ProcessGroup] = (),
    ) -> None:
        self.ranks, self.device = list(ranks), device
        self.stage, self.stages = self.ranks.index(dist.get_rank()), len(self.ranks)
        self.carrier = device if lanes else CPU
        self._forward, self._backward = directions
        self._groups = {direction: lanes[direction] if lanes else None for direction in directions}
        self._sent: deque[list[tuple[dist.Work, Tensor]]] = deque()  # by message
        self.forwards: object | None = None  # the `PipelineForwards` of the rollout that uses the channel

    def send_next(self, message: object) -> None:
        """Send to the next rank."""
        self._send(message, self.stage + 1, direction=self._forward)

    def recv_previous(self) -> Any:
        """Receive from the previous rank."""
        return self._recv(self.stage - 1, direction=self._forward)

    def send_first(self, message: object) -> None:
        """Send from the last rank to the first."""
        self._send(message, 0, direction=self._backward)

    def recv_last(self) -> Any:
        """Receive what the last rank sends to the first."""
        return self._recv(self.stages - 1, direction=self._backward)

    def shut_down(self) -> None:
        """End the loops of the ranks after this one."""
        self.send_next(Shutdown())
        self.flush()

    def flush(self) -> None:
        """Wait until all sends are done."""
        while self._sent:
            self._wait_for_oldest()

    def _wait_for_oldest(self) -> None:
        with waiting_for_others():
            for work, _ in self._sent.popleft():
                work.wait()

    def _send(self, message: object, stage: int, *, direction: int) -> None:
        encoded, tensors = encode(message)
        assert len(encoded) <= HEADER_BYTES, f"a header of {len(encoded)} bytes"
        header = torch.zeros(HEADER_BYTES, dtype=torch.uint8)
        header[: len(encoded)] = torch.frombuffer(encoded, dtype=torch.uint8)
        parts = [(header, None), *((tensor.to(self.carrier), self._groups[direction]) for tensor in tensors if tensor.numel())]
        while self._sent and (len(self._sent) >= MESSAGES or all(work.is_completed() for work, _ in self._sent[0])):
            self._wait_for_oldest()
        self._sent.append([(dist.isend(part, self.ranks[stage], group=group, tag=direction), part) for part, group in parts])

    def _recv(self, stage: int, *, direction: int) -> Any:
        header = torch.empty(HEADER_BYTES, dtype=torch.uint8)

        def receive(layout: TensorLayout) -> Tensor:
            tensor = torch.empty(layout.numel, dtype=layout.dtype, device=self.carrier)
            if tensor.numel():
                dist.recv(tensor, self.ranks[stage], group=self._groups[direction], tag=direction)
            return tensor.to(self.device)

        with waiting_for_others():
            dist.recv(header, self.ranks[stage], tag=direction)
            return decode(header.numpy(), receive)


def broadcast(message: object, group: dist.ProcessGroup) -> Any:
    """Send a message from the first rank of a group to all others through host memory; every rank must call this. Gives the message."""
    first = dist.get_rank(group) == 0
    encoded, tensors = encode(message) if first else (b"", [])
    box = [encoded]
    with waiting_for_others():
        dist.broadcast_object_list(box, group_src=0, group=group, device=CPU)
        if first:
            for tensor in tensors:
                dist.broadcast(tensor.to(CPU), group_src=0, group=group)
            return message

        def receive(layout: TensorLayout) -> Tensor:
            tensor = torch.empty(layout.numel, dtype=layout.dtype)
            dist.broadcast(tensor, group_src=0, group=group)
            return tensor

        return decode(box[0], receive)


def encode(message: object) -> tuple[bytearray, list[Tensor]]:
    """A message as bytes, and the elements of its tensors in the order of memory; a tensor that occurs twice is sent once."""
    file, sent = io.BytesIO(), {}
    pickler = pickle.Pickler(file)

    def number(value: object) -> int | None:
        if not isinstance(value, Tensor):
            return None
        if id(value) not in sent:
            sent[id(value)] = (len(sent), *_layout(value))
        return sent[id(value)][0]

    pickler.persistent_id = number
    pickler.dump(message)
    layouts, tensors = [layout for _, layout, _ in sent.values()], [tensor for _, _, tensor in sent.values()]
    return bytearray(pickle.dumps((layouts, file.getvalue()))), tensors


def decode(encoded: bytes, receive: Callable[[TensorLayout], Tensor]) -> Any:
    """A message from its bytes; `receive` gives the elements of each of its tensors, in the order of `encode`."""
    layouts, message = pickle.loads(encoded)
    tensors = [receive(layout).as_strided(layout.shape, layout.strides) for layout in layouts]
    unpickler = pickle.Unpickler(io.BytesIO(message))
    unpickler.persistent_load = tensors.__getitem__
    return unpickler.load()


def _layout(tensor: Tensor) -> tuple[TensorLayout, Tensor]:
    """The layout of a tensor, and a copy of its elements in the order of memory."""
    once = tensor[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())]
    copy = once.clone()  # without gaps, with the axes in the same order
    strides = tuple(stride if given else 0 for stride, given in zip(copy.stride(), tensor.stride(), strict=True))
    return TensorLayout(tensor.dtype, copy.numel(), tuple(tensor.shape), strides), copy.as_strided((copy.numel(),), (1,))
