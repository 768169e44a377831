"""Weights under an offloading plan: no more host memory than the offloaded layers need, and the same values."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_config, tiny_model

from sonic.checkpoint.load import without_memory
from sonic.parallel import offload as module
from sonic.parallel.mesh import World
from sonic.parallel.offload import allocate_layers
from sonic.parallel.parallel_config import OffloadConfig, ParallelConfig

CPU = torch.device("cpu")


def test_weights_that_move_are_unchanged_and_in_one_piece_of_memory():
    layer = prefetcher_of().layers[1]
    before = [weight.clone() for weight in layer.weights]
    memory = layer.move(CPU)
    within = range(memory.data_ptr(), memory.data_ptr() + memory.nbytes)
    assert memory.nbytes == layer.bytes
    assert all(weight.data_ptr() in within and weight.data_ptr() % 64 == 0 for weight in layer.weights)
    assert all(map(torch.equal, layer.weights, before))
    assert [weight.data_ptr() for weight in layer.weights] == [home.data_ptr() for home in layer.home]


def test_resident_layers_are_never_in_host_memory():
    model = without_memory(tiny_config()).requires_grad_(False)
    size = max(module.OffloadedLayer(modules).bytes for modules in module.layers_of(model))
    config = ParallelConfig("offload", offload=OffloadConfig(resident_gib=size / 2**30, store="mmap"))
    allocate_layers(model, World("offload", CPU), config)  # what waits has no memory but the file
    nowhere = [[weight.is_meta for part in modules for weight in part.parameters()] for modules in module.layers_of(model)]
    assert [set(each) for each in nowhere] == [{False}, {True}, {True}]
    assert not any(weight.is_meta for name, weight in model.named_parameters() if not name.startswith(("blocks", "audio_injectors")))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only memory for a GPU is pinned")
def test_only_offloaded_layers_are_pinned_and_only_while_they_are_used():
    model, device = tiny_model().requires_grad_(False), torch.device("cuda")
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    layers = [module.OffloadedLayer(modules) for modules in module.layers_of(model)]
    largest = max(layer.bytes for layer in layers)
    prefetcher = module.LayerPrefetcher(layers, device, OffloadConfig(resident_gib=1.5 * largest / 2**30, store="pinned"))
    prefetcher.allocate()
    assert len(prefetcher.resident) == 1
    for index, layer in enumerate(prefetcher.layers):
        assert all(home.is_cuda == (index in prefetcher.resident) != home.is_pinned() for home in layer.home)
    for index in range(len(layers)):
        prefetcher.before_layer(index)
        torch.cuda.synchronize()
        assert all(weight.is_cuda for weight in layers[index].weights)
    assert all(torch.equal(weight.cpu(), before[name]) for name, weight in model.named_parameters())
    homes = [home for index, layer in enumerate(layers) if index not in prefetcher.resident for home in layer.home]
    del prefetcher, layers, layer
    assert not any(home.is_pinned() for home in homes)


def prefetcher_of(**settings) -> module.LayerPrefetcher:
    """The prefetcher of a tiny model on a CPU, with all three layers offloaded unless free memory is given."""
    return module.LayerPrefetcher(
        [module.OffloadedLayer(modules) for modules in module.layers_of(tiny_model())], CPU, OffloadConfig(**settings)
    )


@pytest.mark.parametrize("slots", [1, 2])
def test_the_layer_that_runs_has_its_weights_in_a_slot_in_every_pass(slots):
    prefetcher = prefetcher_of(resident_gib=0, slots=slots)
    for layer in 3 * [0, 1, 2]:
        prefetcher.before_layer(layer)
        slots_of = [(slot.data_ptr(), slot.data_ptr() + slot.nbytes) for slot in prefetcher.slots]
        positions = [weight.data_ptr() for weight in prefetcher.layers[layer].weights]
        assert any(all(start <= allocate < stop for allocate in positions) for start, stop in slots_of), layer
        assert all(map(torch.equal, prefetcher.layers[layer].weights, prefetcher.layers[layer].home))


def test_resident_weights_leave_room_for_the_slots(monkeypatch):
    largest = max(layer.bytes for layer in prefetcher_of().layers)
    monkeypatch.setattr(module.LayerPrefetcher, "_free", lambda self: 2.5 * largest / 2**30)  # of three layers
    for slots, stay in ((1, 1), (2, 0)):
        prefetcher = prefetcher_of(slots=slots)
        prefetcher.allocate()
        assert (len(prefetcher.resident), len(prefetcher.slots)) == (stay, slots)
