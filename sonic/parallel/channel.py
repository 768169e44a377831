"""Point-to-point messages between ranks of a pipeline: a header with a small value, and tensors as one buffer of bytes."""

from __future__ import annotations

import math
import pickle
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

HEADER_BYTES = 2048
FORWARD, BACKWARD = 0, 1  # the directions of a channel
ALIGN = 16  # bytes at which each tensor of a message begins
KEPT = 8  # messages beyond one per rank whose send buffers are held


class P2PChannel:
    """Point-to-point messages from each rank of a group to the next one, and from the last to the first.

    The group is the stages of a pipeline, or two ranks. A message is a header of fixed size, which contains a small picklable value,
    and one buffer of bytes. Sends return at once; their buffers are held until they are done. The two directions of a channel, and
    those of other channels of the same rank, must not block each other: gloo separates `directions` by tags, NCCL needs a process
    group for each, which is `lanes[direction]`.
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
        self.carrier = device if lanes else torch.device("cpu")
        self._forward, self._backward = directions
        self._groups = {direction: lanes[direction] if lanes else None for direction in directions}
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()
        self.forwards: object | None = None  # the `PipelineForwards` of the rollout that uses the channel

    def send_next(self, message: NamedTuple, tensors: Sequence[Tensor | None]) -> None:
        """Send to the next rank."""
        self._send(message, tensors, self.stage + 1, direction=self._forward)

    def recv_previous(self) -> tuple[NamedTuple, list[Tensor | None]]:
        """Receive from the previous rank."""
        return self._recv(self.stage - 1, direction=self._forward)

    def send_first(self, message: NamedTuple, tensors: Sequence[Tensor | None]) -> None:
        """Send from the last rank to the first."""
        self._send(message, tensors, 0, direction=self._backward)

    def recv_last(self) -> tuple[NamedTuple, list[Tensor | None]]:
        """Receive what the last rank sends to the first."""
        return self._recv(self.stages - 1, direction=self._backward)

    def flush(self) -> None:
        """Wait until all sends are done."""
        while self._sent:
            self._sent.popleft()[0].wait()

    def _send(self, message: NamedTuple, tensors: Sequence[Tensor | None], stage: int, *, direction: int) -> None:
        specs = [None if tensor is None else (tensor.dtype, tuple(tensor.shape)) for tensor in tensors]
        header = torch.zeros(HEADER_BYTES, dtype=torch.uint8)
        encoded = pickle.dumps((message, specs))
        assert len(encoded) <= HEADER_BYTES, f"a header of {len(encoded)} bytes"
        header[: len(encoded)] = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
        payload = _packed([tensor for tensor in tensors if tensor is not None], self.carrier)
        while len(self._sent) > 2 * (self.stages + KEPT):  # more than can be in flight, so the oldest have arrived
            self._sent.popleft()[0].wait()
        for part, group in ((header, None), (payload, self._groups[direction])):
            if part.numel():
                self._sent.append((dist.isend(part, self.ranks[stage], group=group, tag=direction), part))

    def _recv(self, stage: int, *, direction: int) -> tuple[NamedTuple, list[Tensor | None]]:
        header = torch.empty(HEADER_BYTES, dtype=torch.uint8)
        dist.recv(header, self.ranks[stage], tag=direction)
        message, specs = pickle.loads(header.numpy().tobytes())
        payload = torch.empty(sum(_room(*spec) for spec in specs if spec), dtype=torch.uint8, device=self.carrier)
        if payload.numel():
            dist.recv(payload, self.ranks[stage], group=self._groups[direction], tag=direction)
        return message, _unpacked(payload.to(self.device), specs)


def _packed(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """One buffer with the bytes of all tensors, each starting at a multiple of ALIGN."""
    packed = torch.empty(sum(_room(tensor.dtype, tensor.shape) for tensor in tensors), dtype=torch.uint8, device=device)
    start = 0
    for tensor in tensors:
        data = tensor.contiguous().flatten().view(torch.uint8)
        packed[start : start + data.numel()].copy_(data)
        start += _room(tensor.dtype, tensor.shape)
    return packed


def _unpacked(packed: Tensor, specs: Sequence[tuple[torch.dtype, tuple[int, ...]] | None]) -> list[Tensor | None]:
    """The tensors in a buffer of `_packed`, as views."""
    found, start = [], 0
    for spec in specs:
        if spec is None:
            found.append(None)
            continue
        dtype, shape = spec
        size = math.prod(shape) * dtype.itemsize
        found.append(packed[start : start + size].view(dtype).view(shape))
        start += _room(dtype, shape)
    return found


def _room(dtype: torch.dtype, shape: Sequence[int]) -> int:
    return -(-math.prod(shape) * dtype.itemsize // ALIGN) * ALIGN
