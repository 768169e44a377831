"""Weights under an offloading plan: no more host memory than the offloaded layers need, and the same values."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_config, tiny_model

from sonic.checkpoint.load import without_memory
from sonic.parallel import offload as module
from sonic.parallel.offload import PinnedMemory, allocate, offload
from sonic.parallel.parallel_config import OffloadConfig, ParallelConfig

CPU = torch.device("cpu")


@pytest.fixture
def pieces(monkeypatch) -> list[int]:
    """Sizes of the pinned pieces, on a machine that cannot pin."""
    sizes = []

    def pinned(size: int) -> torch.Tensor:
        sizes.append(size)
        return torch.empty(size, dtype=torch.uint8)

    monkeypatch.setattr(module, "_pinned", pinned)
    return sizes


def test_pinned_weights_are_unchanged_in_pieces_that_torch_does_not_round_up(pieces, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 2**14)
    tensors = [torch.randn(size, 3).to(dtype) for size in (700, 5, 900, 2000, 40) for dtype in (torch.float32, torch.bfloat16)]
    memory = PinnedMemory(sum(tensor.nbytes for tensor in tensors))
    kept = [memory.copy_in(tensor) for tensor in tensors]
    assert all(there.dtype == tensor.dtype and torch.equal(there, tensor) for there, tensor in zip(kept, tensors, strict=True))
    assert all(there.data_ptr() != tensor.data_ptr() for there, tensor in zip(kept, tensors, strict=True))
    assert all(size & (size - 1) == 0 for size in pieces)
    assert max(pieces) == 2**15  # one weight is larger than a piece
    assert len(pieces) < len(tensors)


def test_resident_layers_are_never_in_host_memory():
    model = without_memory(tiny_config()).requires_grad_(False)
    size = max(module.OffloadedLayer(modules).bytes for modules in module.layers_of(model))
    allocate(model, CPU, OffloadConfig(resident_gib=size / 2**30, store="mmap"))  # what waits has no memory but the file
    nowhere = [[weight.is_meta for part in modules for weight in part.parameters()] for modules in module.layers_of(model)]
    assert [set(each) for each in nowhere] == [{False}, {True}, {True}]
    assert not any(weight.is_meta for name, weight in model.named_parameters() if not name.startswith(("blocks", "audio_injectors")))


def test_only_offloaded_layers_are_pinned(pieces, monkeypatch):
    model, prefetchers = tiny_model(), []
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    monkeypatch.setattr(module, "LayerPrefetcher", lambda *given: prefetchers.append(pinning(*given)) or prefetchers[0])
    largest = max(sum(module._aligned_bytes(weight) for weight in part.parameters()) for part in model.blocks) * 2
    offload(model, CPU, ParallelConfig("offload", offload=OffloadConfig(resident_gib=largest / 2**30)))
    (prefetcher,) = prefetchers
    waiting = [layer for index, layer in enumerate(prefetcher.layers) if index not in prefetcher.resident]
    assert prefetcher.resident
    assert len(waiting) + len(prefetcher.resident) == 3
    assert sum(layer.bytes for layer in waiting) <= sum(pieces) < 2 * sum(layer.bytes for layer in waiting)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


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


def pinning(layers, device, config) -> module.LayerPrefetcher:
    """A prefetcher that pins memory as on a GPU."""
    prefetcher = PREFETCHER(layers, device, config)
    prefetcher.pins = True
    return prefetcher


PREFETCHER = module.LayerPrefetcher
