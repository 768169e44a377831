"""Offloading for one device that is too small: layer weights are in host memory and are copied to slots on the device before use."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from sonic.geometry import GIB
from sonic.model.dit import AvatarDiT
from sonic.model.execution import LOCAL, Execution
from sonic.parallel.host_rings import HostRings
from sonic.parallel.layer_ranges import resident_layers
from sonic.parallel.mesh import World
from sonic.parallel.parallel_config import OffloadConfig, ParallelConfig
from sonic.system.device_stream import Event, current_stream, stream_for
from sonic.system.heartbeat import heartbeat

ROOM_GIB = 2.0  # left free for activations when offload.resident_gib=-1 fills the device with weights


class OffloadedLayer:
    """The weights of one layer and its injector: `home` is their tensor in host memory; a weight's data is that, or its copy in a slot."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.weights = [weight for module in modules for weight in module.parameters()]
        self.home = [weight.data for weight in self.weights]
        self.bytes = sum(_aligned_bytes(tensor) for tensor in self.home)

    def load_into(self, slot: Tensor, copy: Callable[[Tensor, Tensor], object] = Tensor.copy_) -> None:
        """Copy the weights into a slot of memory, one after the other, and use the copy."""
        start = 0
        for weight, home in zip(self.weights, self.home, strict=True):
            weight.data = slot[start : start + home.nbytes].view(home.dtype).view(home.shape)
            copy(weight.data, home)
            start += _aligned_bytes(home)

    def move(self, device: torch.device) -> Tensor:
        """Move the weights permanently into one piece of memory, which is returned, and free the memory where they were."""
        memory = torch.empty(self.bytes, dtype=torch.uint8, device=device)
        self.load_into(memory)
        self.home = [weight.data for weight in self.weights]
        return memory

    def release(self) -> None:
        """Use the weights in host memory again instead of the copy."""
        for weight, home in zip(self.weights, self.home, strict=True):
            weight.data = home


class LayerPrefetcher:
    """Copies each layer's weights to the device before the layer runs, and those of the next layers while it runs.

    Copies run on a stream of their own: a slot is overwritten only after all work queued before is done, and a layer waits only for its
    own copy.
    """

    def __init__(self, layers: Sequence[OffloadedLayer], device: torch.device, config: OffloadConfig) -> None:
        self.layers, self.device = list(layers), device
        self.count, self.resident_gib = config.slots, config.resident_gib
        self.pins = device.type == "cuda" and config.store == "pinned"
        self.allocated, self.current = False, -1
        self.slots: list[Tensor] = []
        self.resident: set[int] = set()
        self.loaded: dict[int, tuple[Tensor, Event]] = {}  # layer -> its slot, and when its weights are there
        self.stream = stream_for("weights", device)

    def allocate(self) -> None:
        """Move the resident layers to the device, spread evenly over all (resident_gib=-1: as many as fit now), and pin the others."""
        self.allocated = True
        sizes = [layer.bytes for layer in self.layers]
        self.resident = resident_of(sizes, self.resident_gib if self.resident_gib >= 0 else self._free() - self.count * max(sizes) / GIB)
        for index, layer in enumerate(self.layers):
            heartbeat()
            if index not in self.resident and self.pins:
                self.stream.pin(layer.move(torch.device("cpu")), layer)
            elif index in self.resident and layer.home[0].device.type != self.device.type:
                layer.move(self.device)
        if len(self.resident) < len(self.layers):
            self.slots = [torch.empty(max(sizes), dtype=torch.uint8, device=self.device) for _ in range(self.count)]

    def before_layer(self, index: int) -> None:
        """Load the weights of layer `index`, which is about to run, and start loading the next ones; called once per sequence."""
        if not self.allocated:
            self.allocate()
        if index in self.resident or index == self.current:
            return
        self.current = index
        done = current_stream(self.device).record()
        ahead = self._next(index)
        for wanted in ahead:
            if wanted not in self.loaded:
                self._fetch(wanted, keep=ahead, after=done)
        current_stream(self.device).wait(self.loaded[index][1])

    def _next(self, index: int) -> list[int]:
        """This layer and the next ones, as many as there are slots, in cyclic order and without resident layers."""
        cycle = [*range(index, len(self.layers)), *range(index)]
        return [layer for layer in cycle if layer not in self.resident][: self.count]

    def _fetch(self, layer: int, *, keep: Sequence[int], after: Event) -> None:
        """Load a layer into an empty slot, or into that of a layer which is not needed now."""
        if len(self.loaded) < self.count:
            slot = self.slots[len(self.loaded)]
        else:
            old = next(each for each in self.loaded if each not in keep)
            slot, _ = self.loaded.pop(old)
            self.layers[old].release()
        self.stream.wait(after)
        self.layers[layer].load_into(slot, self.stream.copy)
        self.loaded[layer] = slot, self.stream.record()

    def _free(self) -> float:
        """GiB of the device that weights may take; 0 on a CPU, where a copy gains nothing."""
        if self.device.type != "cuda":
            return 0.0
        torch.cuda.empty_cache()  # memory of freed encoders that torch caches would count as used
        return torch.cuda.mem_get_info(self.device)[0] / GIB - ROOM_GIB


def allocate_layers(model: AvatarDiT, world: World, config: ParallelConfig) -> None:
    """Allocate the weights of a transformer on the meta device, as `allocate_offloaded` does."""
    allocate_offloaded(model, layers_of(model), world, config=config)


def allocate_offloaded(model: nn.Module, layers: Sequence[Sequence[nn.Module]], world: World, *, config: ParallelConfig) -> None:
    """Allocate the weights of a model on the meta device, whose layers are these lists of modules.

    Layers that are known to stay resident get memory on the device, so that they never take host memory; others get host memory, or
    none when they are mapped from the file (offload.store=mmap); everything outside the layers is on the device.
    """
    inside = {part for modules in layers for module in modules for part in module.modules()}
    for module in model.modules():
        if module not in inside:
            module.to_empty(device=world.device, recurse=False)
    resident = resident_of([OffloadedLayer(modules).bytes for modules in layers], config.offload.resident_gib)
    for index, modules in enumerate(layers):
        if index in resident or config.offload.store != "mmap":
            for module in modules:
                module.to_empty(device=world.device if index in resident else "cpu")


def load_before_use(model: AvatarDiT, world: World, config: ParallelConfig) -> Execution:
    """Add hooks that load the weights of every layer before it runs. Gives an execution with the device of the KV caches."""
    load_layers_before_use(layers_of(model), world, config)
    if config.offload.kv == "device":
        return LOCAL
    rings = HostRings(world.device)
    return Execution(run_blocks=rings.run_blocks, cache_device=torch.device("cpu"), windows=rings)


def load_layers_before_use(layers: Sequence[Sequence[nn.Module]], world: World, config: ParallelConfig) -> None:
    """Add hooks that load the weights of every layer before its first module runs."""
    prefetcher = LayerPrefetcher([OffloadedLayer(modules) for modules in layers], world.device, config.offload)
    if config.offload.resident_gib >= 0:  # else it is known only after the first video's KV caches are allocated
        prefetcher.allocate()
    for index, (first, *_) in enumerate(layers):
        first.register_forward_pre_hook(lambda module, args, index=index: prefetcher.before_layer(index))


def layers_of(model: AvatarDiT) -> list[list[nn.Module]]:
    """The modules of each layer: its block, and the injector after it if there is one."""
    inject = model.config.audio.inject_layers
    return [[block, model.audio_injectors[inject.index(layer)]] if layer in inject else [block] for layer, block in enumerate(model.blocks)]


def resident_of(sizes: Sequence[int], gib: float) -> set[int]:
    """The layers that stay on a device with `gib` GiB for them, given the layers' sizes in bytes; none when `gib` is not known yet (-1)."""
    return set(resident_layers(len(sizes), int(max(0.0, gib) * GIB // max(sizes))))


def _aligned_bytes(tensor: Tensor) -> int:
    """Size of a tensor in bytes, rounded up to a multiple of 256 so that the next one is aligned."""
    return -(-tensor.nbytes // 256) * 256
