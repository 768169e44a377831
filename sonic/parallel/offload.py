"""One device that is too small: weights of the layers wait in host memory and are copied ahead of their use into a ring of slots."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sonic.geometry import GIB
from sonic.model.dit import AvatarDiT
from sonic.model.execution import Execution
from sonic.parallel.layer_ranges import resident_layers
from sonic.parallel.parallel_config import OffloadConfig, ParallelConfig
from sonic.system.heartbeat import beat

PIECE = 2**29  # bytes of host memory that are pinned at a time
ROOM_GIB = 2.0  # left free for activations where offload.resident_gib=-1 lets the weights take what there is


class PinnedMemory:
    """Host memory that a GPU copies from by itself, in pieces of a power of two: torch rounds all that it pins up to one, which for
    the weights of a layer, one by one or together, would be half as much again."""

    def __init__(self, size: int) -> None:
        self.piece = min(PIECE, _power_of_two(size))
        self.rests: list[Tensor] = []  # what is left of each piece

    def keep(self, tensor: Tensor) -> Tensor:
        """The same numbers in this memory."""
        size, room = tensor.nbytes, _room(tensor)
        index = next((index for index, rest in enumerate(self.rests) if rest.numel() >= room), None)
        if index is None:
            index = len(self.rests)
            self.rests.append(_pinned(max(self.piece, _power_of_two(room))))
        there, self.rests[index] = self.rests[index][:size], self.rests[index][room:]
        return there.view(tensor.dtype).view(tensor.shape).copy_(tensor)


class Station:
    """The weights that one layer needs, its injector's among them: at home in host memory, or wherever `move` put them last."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.weights = [weight for module in modules for weight in module.parameters()]
        self.home = [weight.data for weight in self.weights]
        self.bytes = sum(_room(tensor) for tensor in self.home)

    def move(self, slot: Tensor) -> None:
        """Copy into a slot of device memory and use the weights from there."""
        start = 0
        for weight, home in zip(self.weights, self.home, strict=True):
            there = slot[start : start + home.nbytes].view(home.dtype).view(home.shape)
            there.copy_(home, non_blocking=True)
            weight.data = there
            start += _room(home)

    def stay(self, device: torch.device) -> None:
        """Move for good, unless it is there already; host memory is given back."""
        if self.home[0].device.type != device.type:
            self.move(torch.empty(self.bytes, dtype=torch.uint8, device=device))
            self.home = [weight.data for weight in self.weights]

    def pin(self, memory: PinnedMemory) -> None:
        """Make pinned memory the home."""
        for index, weight in enumerate(self.weights):
            weight.data = self.home[index] = memory.keep(self.home[index])

    def go_home(self) -> None:
        """Forget the copy."""
        for weight, home in zip(self.weights, self.home, strict=True):
            weight.data = home


class Shuttle:
    """Brings each layer's weights to the device before the layer runs, and those of the next ones while it runs.

    On a GPU copies run on a stream of their own: a slot is written once all work that was queued before is done, and a layer
    waits for its copy alone. On a CPU copying takes its turn.
    """

    def __init__(self, stations: Sequence[Station], device: torch.device, config: OffloadConfig) -> None:
        self.stations, self.device = list(stations), device
        self.count, self.resident_gib = config.slots, config.resident_gib
        self.pins = device.type == "cuda" and config.store == "pinned"
        self.settled, self.current = False, -1
        self.slots: list[Tensor] = []
        self.resident: set[int] = set()
        self.holder: list[int | None] = [None] * self.count  # the station whose weights are in each slot
        self.ready: dict[int, torch.cuda.Event | None] = {}
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def settle(self) -> None:
        """Give the weights that stay their place, spread evenly over the layers; -1 = as many as fit now. Pin those that wait."""
        self.settled = True
        sizes = [station.bytes for station in self.stations]
        self.resident = resident_of(sizes, self.resident_gib if self.resident_gib >= 0 else self._free() - self.count * max(sizes) / GIB)
        waiting = [station for index, station in enumerate(self.stations) if index not in self.resident]
        memory = PinnedMemory(sum(station.bytes for station in waiting))
        for index in sorted(self.resident):
            beat()
            self.stations[index].stay(self.device)
        for station in waiting if self.pins else ():
            beat()
            station.pin(memory)
        if waiting:
            self.slots = [torch.empty(max(sizes), dtype=torch.uint8, device=self.device) for _ in range(self.count)]

    def arrive(self, index: int) -> None:
        """Called when layer `index` is about to run; more than once in a row while several items visit it."""
        if not self.settled:
            self.settle()
        if index in self.resident or index == self.current:
            return
        self.current = index
        done = torch.cuda.current_stream(self.device).record_event() if self.stream else None
        ahead = self._next(index)
        for wanted in ahead:
            if wanted not in self.ready:
                self._fetch(wanted, keep=ahead, after=done)
        if self.stream:
            torch.cuda.current_stream(self.device).wait_event(self.ready[index])

    def _next(self, index: int) -> list[int]:
        """This station and those that fit into the slots after it, in the order of the layers, round and round."""
        cycle = [*range(index, len(self.stations)), *range(index)]
        return [station for station in cycle if station not in self.resident][: self.count]

    def _fetch(self, station: int, *, keep: Sequence[int], after: torch.cuda.Event | None) -> None:
        slot = next(place for place, holder in enumerate(self.holder) if holder not in keep)
        before = self.holder[slot]
        if before is not None:
            self.ready.pop(before)
            self.stations[before].go_home()
        self.holder[slot] = station
        if self.stream is None:
            self.stations[station].move(self.slots[slot])
            self.ready[station] = None
            return
        self.stream.wait_event(after)
        with torch.cuda.stream(self.stream):
            self.stations[station].move(self.slots[slot])
            self.ready[station] = self.stream.record_event()

    def _free(self) -> float:
        """GiB that weights may take; on a CPU none, because a copy there gains nothing."""
        if self.device.type != "cuda":
            return 0.0
        torch.cuda.empty_cache()  # what torch keeps of the encoders that are gone counts as taken
        return torch.cuda.mem_get_info(self.device)[0] / GIB - ROOM_GIB


def place(model: AvatarDiT, device: torch.device, config: OffloadConfig) -> None:
    """Memory for a model without any: layers that are known to stay get theirs on the device, so that host memory never holds them,
    others in host memory, or none when the file itself is their memory; all else is on the device."""
    for name, child in model.named_children():
        if name not in ("blocks", "audio_injectors"):
            child.to_empty(device=device)
    layers = layers_of(model)
    resident = resident_of([Station(modules).bytes for modules in layers], config.resident_gib)
    for index, modules in enumerate(layers):
        if index in resident or config.store != "mmap":
            for module in modules:
                module.to_empty(device=device if index in resident else "cpu")


def offload(model: AvatarDiT, device: torch.device, config: ParallelConfig) -> Execution:
    """Fetch every layer's weights before it runs; layers lie in host memory, all else is on `device`. Says where KV caches lie."""
    settings = config.offload
    stations = [Station(modules) for modules in layers_of(model)]
    shuttle = Shuttle(stations, device, settings)
    if settings.resident_gib >= 0:  # else only the first film's memories say what fits
        shuttle.settle()
    for layer, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda module, args, layer=layer: shuttle.arrive(layer))
    return Execution(cache_device=torch.device("cpu") if settings.kv == "host" else None)


def layers_of(model: AvatarDiT) -> list[list[nn.Module]]:
    """What runs in each layer: its block and the injector after it, if there is one."""
    inject = model.config.audio.inject_layers
    return [[block, model.audio_injectors[inject.index(layer)]] if layer in inject else [block] for layer, block in enumerate(model.blocks)]


def resident_of(sizes: Sequence[int], gib: float) -> set[int]:
    """The layers of these sizes in bytes that stay on a device with so much room for them; none when that is not known yet (-1)."""
    return set(resident_layers(len(sizes), int(max(0.0, gib) * GIB // max(sizes))))


def _room(tensor: Tensor) -> int:
    """Bytes of a tensor, rounded up so that the next one is aligned."""
    return -(-tensor.nbytes // 256) * 256


def _power_of_two(size: int) -> int:
    """The smallest that is not below `size`."""
    return 1 << max(0, size - 1).bit_length()


def _pinned(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)
