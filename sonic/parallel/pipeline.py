"""The layer pipeline: each rank owns a range of layers and their KV rings, and forwards of many blocks flow through them.

A forward of block b at sampling step i needs, in every layer, the keys of earlier blocks at step i, and before the first layer
the latents of block b after step i - 1. So forwards of different blocks and steps are in different ranks at the same time:
weights never move, and the number of ranks has nothing to do with the number of steps.
"""

from __future__ import annotations

import math
import pickle
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sonic.config import ModelConfig
from sonic.geometry import BlockSpan
from sonic.model.audio_tokens import AudioTokens
from sonic.model.dit import AvatarDiT, Trip
from sonic.model.forwards import Item
from sonic.model.kv_cache import KVCache
from sonic.parallel.mesh import World
from sonic.parallel.ranges import best_ranges, ranges_of
from sonic.types import Conditions

HEADER_BYTES = 2048
ONWARD, BACK = 0, 1  # the ways of a line
ALIGN = 16  # bytes at which each tensor of a message begins
FIRST = ("patch_embed", "pose_embed", "frame_pack", "roles", "time_embed", "text_embed", "audio_encoder")
KEPT = 8  # messages beyond one per rank whose buffers are kept
SPARE = 1  # forwards under way beyond one per rank, so that nobody waits for a message


class Note(NamedTuple):
    """What a message is about: the memory of a film, one forward, or the end of the work.

    `shape` is [batch, rows, columns] of patches; `latents` the dtype that the answer goes back in.
    """

    kind: str
    told: int = 0
    steps: int = 0
    ring: int = 0
    ref_position: int = 0
    span: BlockSpan | None = None
    shape: tuple[int, int, int] = (0, 0, 0)
    motion: bool = False
    latents: torch.dtype = torch.float32


def layer_ranges(config: ModelConfig, stages: int, sizes: Sequence[int] | None = None) -> list[range]:
    """Layers of each rank: so many as `sizes` says, or as even in arithmetic as they can be (an injector counts for what it adds).

    Raises ValueError when the sizes are not those of this model on so many ranks.
    """
    dim, ffn, count = config.trunk.hidden_dim, config.trunk.ffn_dim, config.trunk.num_layers
    if sizes:
        if len(sizes) != stages or sum(sizes) != count:
            raise ValueError(
                f"parallel.layers={list(sizes)} does not share {count} blocks out among {stages} stages; "
                f"give {stages} numbers that add up to {count}, or leave it out"
            )
        return ranges_of(sizes)
    block, injector = 6 * dim * dim + 2 * dim * ffn, 2 * dim * dim
    costs = [block + injector * (layer in config.audio.inject_layers) for layer in range(count)]
    return best_ranges(count, stages, lambda stage, layers: float(sum(costs[layer] for layer in layers)))


def keep_range(model: AvatarDiT, stage: int, ranges: Sequence[range]) -> None:
    """Leave in the model what one rank of the pipeline owns, nothing behind the last range; the rest becomes None and every name
    stays."""
    mine = ranges[stage] if stage < len(ranges) else range(0)
    for layer in range(len(model.blocks)):
        if layer not in mine:
            model.blocks[layer] = None
    for index, layer in enumerate(model.config.audio.inject_layers):
        if layer not in mine:
            model.audio_injectors[index] = None
    for name in FIRST if stage else ():
        setattr(model, name, None)
    if stage != len(ranges) - 1:
        model.head = None


class Line:
    """Ranks in a row, with a way back from the last to the first: those of a pipeline, or two that talk to each other.

    A message is a header of fixed size, a small value that can be pickled, and one buffer of bytes. Sends do not wait; their
    buffers are kept until they are done. The two directions, and those of another line that a rank is part of, must not wait for
    each other: gloo tells `ways` apart by a tag, NCCL needs a group for each, which is the one of that number among `lanes`.
    """

    def __init__(
        self,
        ranks: Sequence[int],
        device: torch.device,
        ways: tuple[int, int] = (ONWARD, BACK),
        *,
        lanes: Sequence[dist.ProcessGroup] = (),
    ) -> None:
        self.ranks, self.device = list(ranks), device
        self.stage, self.stages = self.ranks.index(dist.get_rank()), len(self.ranks)
        self.carrier = device if lanes else torch.device("cpu")
        self._onward, self._back = ways
        self._lanes = {way: lanes[way] if lanes else None for way in ways}
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()
        self.film: Stages | None = None

    def pass_on(self, note: NamedTuple, tensors: Sequence[Tensor | None]) -> None:
        """To the next rank."""
        self._send(note, tensors, self.stage + 1, way=self._onward)

    def receive(self) -> tuple[NamedTuple, list[Tensor | None]]:
        """From the rank before."""
        return self._receive(self.stage - 1, way=self._onward)

    def answer(self, note: NamedTuple, tensors: Sequence[Tensor | None]) -> None:
        """From the last rank to the first."""
        self._send(note, tensors, 0, way=self._back)

    def hear(self) -> tuple[NamedTuple, list[Tensor | None]]:
        """What the last rank answers."""
        return self._receive(self.stages - 1, way=self._back)

    def flush(self) -> None:
        """Wait until everything that was sent has left."""
        while self._sent:
            self._sent.popleft()[0].wait()

    def _send(self, note: NamedTuple, tensors: Sequence[Tensor | None], stage: int, *, way: int) -> None:
        specs = [None if tensor is None else (tensor.dtype, tuple(tensor.shape)) for tensor in tensors]
        header = torch.zeros(HEADER_BYTES, dtype=torch.uint8)
        words = pickle.dumps((note, specs))
        assert len(words) <= HEADER_BYTES, f"a header of {len(words)} bytes"
        header[: len(words)] = torch.frombuffer(bytearray(words), dtype=torch.uint8)
        payload = _packed([tensor for tensor in tensors if tensor is not None], self.carrier)
        while len(self._sent) > 2 * (self.stages + KEPT):  # more than can be under way, so the oldest have arrived
            self._sent.popleft()[0].wait()
        for part, group in ((header, None), (payload, self._lanes[way])):
            if part.numel():
                self._sent.append((dist.isend(part, self.ranks[stage], group=group, tag=way), part))

    def _receive(self, stage: int, *, way: int) -> tuple[NamedTuple, list[Tensor | None]]:
        header = torch.empty(HEADER_BYTES, dtype=torch.uint8)
        dist.recv(header, self.ranks[stage], tag=way)
        note, specs = pickle.loads(header.numpy().tobytes())
        payload = torch.empty(sum(_room(*spec) for spec in specs if spec), dtype=torch.uint8, device=self.carrier)
        if payload.numel():
            dist.recv(payload, self.ranks[stage], group=self._lanes[way], tag=way)
        return note, _unpacked(payload.to(self.device), specs)


class Stages:
    """The first rank's forwards: its own layers here, the others' along the line. Results come in the order of the items."""

    def __init__(self, model: AvatarDiT, told: Sequence[Conditions], steps: int, *, line: Line) -> None:
        self.model, self.line = model, line
        self.caches: list[KVCache] = []
        self.under_way = 0
        if line.film is not None:  # of which nobody wanted the end, but nobody said so
            line.film.close()
        line.film = self
        for index, each in enumerate(told):
            cache = model.new_cache(each, steps=steps)
            (trip,) = model.travel([model.depart_memory(each)], [model.memory_reach(cache)])
            shape = (each.ref.shape[0], *cache.grid)
            note = Note("memory", index, steps, shape=shape, motion=each.motion is not None)
            line.pass_on(note, _tensors(trip, None))
            self.caches.append(cache)

    def accepts(self, item: Item) -> bool:
        """One forward per rank and a spare one."""
        return self.under_way < self.line.stages + SPARE

    @torch.no_grad()
    def submit(self, item: Item) -> None:
        """Through the layers that are here, and on."""
        cache, span = self.caches[item.told], item.inputs.span
        reach = self.model.block_reach(span, cache, cache.rings[item.ring], ref_position=item.ref_position)
        trip, summary = self.model.depart_block(item.latents, item.timestep, item.inputs)
        (trip,) = self.model.travel([trip], [reach])
        note = Note("block", item.told, ring=item.ring, ref_position=item.ref_position, span=span, latents=item.latents.dtype)
        self.line.pass_on(note, _tensors(trip, summary))
        self.under_way += 1

    def collect(self) -> Sequence[Tensor]:
        """The oldest result."""
        self.under_way -= 1
        return self.line.hear()[1]

    def close(self) -> None:
        """Take in what is still on its way, so that the next film begins with an empty line, and let the rings go."""
        while self.under_way:
            self.collect()
        self.caches.clear()  # encoders of the next film come before its own rings


@torch.no_grad()
def serve(model: AvatarDiT, line: Line, *, dtype: torch.dtype) -> None:
    """What every rank but the first does: take a message, go through the layers that are here, pass it on; until the end."""
    caches: dict[int, KVCache] = {}
    like = torch.empty(0, dtype=dtype, device=line.device)
    last = line.stage == line.stages - 1
    while True:
        note, tensors = line.receive()
        if note.kind == "stop":
            if not last:
                line.pass_on(note, ())
            line.flush()
            return
        if note.kind == "memory":
            cache = reach = None  # the film before goes before there is room for this one
            if note.told == 0:
                caches.clear()
            cache = caches[note.told] = model.cache_of(note.shape, steps=note.steps, motion=note.motion, like=like)
            whole, reach = (1, cache.memory_tokens), model.memory_reach(cache)
        else:
            cache = caches[note.told]
            whole = (note.span.latent_frames // model.config.trunk.patch_size[0], math.prod(cache.grid))
            reach = model.block_reach(note.span, cache, cache.rings[note.ring], ref_position=note.ref_position)
        trip, summary = _trip(tensors, model, whole)
        (trip,) = model.travel([trip], [reach])
        if not last:
            line.pass_on(note, _tensors(trip, summary))
        elif note.kind == "block":
            line.answer(note, (model.arrive(trip, summary, cache.grid).to(note.latents),))


def stop(line: Line) -> None:
    """The first rank's last word."""
    line.pass_on(Note("stop"), ())
    line.flush()


def make_line(world: World) -> Line:
    """The line that this rank is part of."""
    return Line(dist.get_process_group_ranks(world.group("layers"))[: world.stages], world.device, lanes=world.lanes)


def _tensors(trip: Trip, summary: Tensor | None) -> list[Tensor | None]:
    """A trip as a message."""
    (modulation,) = trip.modulations
    audio = (None, None, None) if trip.audio is None else tuple(trip.audio)
    return [trip.tokens, modulation, trip.text, *audio, summary]


def _trip(tensors: Sequence[Tensor | None], model: AvatarDiT, whole: tuple[int, int]) -> tuple[Trip, Tensor | None]:
    """A message as a trip; `whole` counts frames and tokens in a frame over all ranks that share them."""
    tokens, modulation, text, heard, audio_summary, masks, summary = tensors
    layout = ((whole[0], tokens.shape[1] // whole[0]),)
    audio = None if heard is None else AudioTokens(heard, audio_summary, masks)
    return Trip(tokens, layout, (modulation,), text, audio, model.share.exchange((whole,))), summary


def _packed(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Bytes of tensors, each beginning at a multiple of ALIGN."""
    packed = torch.empty(sum(_room(tensor.dtype, tensor.shape) for tensor in tensors), dtype=torch.uint8, device=device)
    start = 0
    for tensor in tensors:
        data = tensor.contiguous().flatten().view(torch.uint8)
        packed[start : start + data.numel()].copy_(data)
        start += _room(tensor.dtype, tensor.shape)
    return packed


def _unpacked(packed: Tensor, specs: Sequence[tuple[torch.dtype, tuple[int, ...]] | None]) -> list[Tensor | None]:
    """The tensors again, as views."""
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
