"""The rollout: equal to the parallel form, reproducible, and of constant memory."""

from __future__ import annotations

import gc
from collections import deque
from itertools import count, islice

import pytest
import torch
from tiny import BLOCK, SIZE, conditions, latents_of, spans_of, tiny_model
from torch.testing import assert_close

from sonic.config import SamplerConfig
from sonic.geometry import BlockSpan
from sonic.inference.forwards import Forwards, open_forwards
from sonic.inference.rollout import NoiseSource, Sampling, rollout, sample_clip
from sonic.model.execution import ForwardRequest
from sonic.sampling.samplers import SAMPLERS


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def settings(**changes) -> SamplerConfig:
    return SamplerConfig(**{"name": "euler", "schedule": "linear", "sample_steps": 2, **changes})


def test_one_step_of_the_rollout_is_the_parallel_form_on_the_same_noise():
    model, given = tiny_model(), conditions(6)
    rng = seeded()
    noise = torch.cat([torch.randn(1, 4, BLOCK, *SIZE, generator=rng) for _ in range(3)], dim=2)
    with torch.no_grad():
        expected = noise - model.forward_blocks(noise, torch.tensor([1000.0]), given)
    assert_close(latents_of(model, given, 3, sample_steps=1), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_the_same_seed_gives_the_same_latents_and_another_seed_others(name, scale):
    model, given = tiny_model(), conditions(4)
    first, again, other = (latents_of(model, given, 2, seed=seed, name=name, sample_guide_scale=scale) for seed in (0, 0, 1))
    assert first.isfinite().all()
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_later_blocks_do_not_change_earlier_ones():
    model, given = tiny_model(), conditions(6)
    assert torch.equal(latents_of(model, given, 3)[:, :, : 2 * BLOCK], latents_of(model, given, 2))


def test_each_sampling_step_reads_the_keys_of_its_own_noise_level():
    """With two steps, a change of the first step of block 0 must affect block 1 through ring 0."""
    model, given = tiny_model(), conditions(4)
    cache = model.prefill(given, model.new_cache(given, steps=2))
    with torch.no_grad():
        inputs = model.prepare_block(given.at(spans_of(1)[0]), spans_of(1)[0])
        for level, ring in zip((1000.0, 700.0), cache.rings, strict=True):
            model.denoise_block(torch.randn(1, 4, BLOCK, *SIZE), torch.tensor([level]), inputs, cache=cache, ring=ring)
    first, second = (ring.keys[1][:, ring.slot(0)] for ring in cache.rings)
    assert (first - second).abs().max() > 1e-2


def test_the_rollout_is_lazy_and_endless():
    model, given = tiny_model(), conditions(400 * BLOCK)
    endless = (BlockSpan(index, index * BLOCK, BLOCK) for index in count())
    blocks = rollout(model, given, endless, sampling=Sampling(settings(sample_steps=1), NoiseSource(seeded())))
    assert [block.span.index for block in islice(blocks, 3)] == [0, 1, 2]


def live_numbers() -> int:
    """Numbers held by all tensors of this process."""
    gc.collect()
    return sum(value.numel() for value in gc.get_objects() if type(value) is torch.Tensor)


def test_the_memory_of_a_rollout_does_not_grow_with_the_number_of_blocks():
    model, given = tiny_model(), conditions(20 * BLOCK)
    blocks = rollout(model, given, iter(spans_of(20)), sampling=Sampling(settings(), NoiseSource(seeded())))
    held = [live_numbers() for block in blocks if block.span.index in (4, 19)]
    assert held[1] <= held[0]


def test_audio_guidance_changes_the_latents():
    model, given = tiny_model(), conditions(4)
    assert (latents_of(model, given, 2) - latents_of(model, given, 2, sample_guide_scale=3.0)).abs().max() > 1e-3


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_makes_a_whole_clip(name):
    model, given = tiny_model(), conditions(4)
    first, again = (sample_clip(model, given, 4, sampling=Sampling(settings(name=name), NoiseSource(seeded()))) for _ in range(2))
    assert first.shape == (1, 4, 4, *SIZE)
    assert torch.equal(first, again)


class Queue:
    """Forwards that are run one at a time and returned late, as by a pipeline of `room` stages."""

    def __init__(self, room: int, forwards: Forwards) -> None:
        self.room, self.forwards, self.most = room, forwards, 0
        self.done: deque[torch.Tensor] = deque()
        self.newest: dict[tuple[int, int], int] = {}

    def accepts(self, item: ForwardRequest) -> bool:
        return len(self.done) < self.room

    def submit(self, item: ForwardRequest) -> None:
        ring, block = (item.cond_index, item.step), item.inputs.span.index
        assert block >= self.newest.setdefault(ring, block), "a block asks a ring that a later one has asked"
        self.newest[ring] = block
        self.forwards.submit(item)
        self.done.extend(self.forwards.collect())
        self.most = max(self.most, len(self.done))

    def collect(self) -> list[torch.Tensor]:
        return [self.done.popleft()]

    def close(self) -> None:
        self.done.clear()


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("room", [2, 3, 5])
def test_queued_forwards_give_the_same_video_as_sequential_ones(room, scale, name, monkeypatch):
    """Blocks are written to the rings in order, although several are started."""
    given, queues = conditions(8), []

    def queued(*given, **settings):
        return queues.append(Queue(room, open_forwards(*given, **settings))) or queues[-1]

    model = tiny_model()
    expected = latents_of(model, given, 4, sample_steps=3, name=name, sample_guide_scale=scale)
    monkeypatch.setattr("sonic.inference.rollout.open_forwards", queued)
    assert torch.equal(latents_of(model, given, 4, sample_steps=3, name=name, sample_guide_scale=scale), expected)
    assert queues[0].most > 1


def test_a_block_of_the_wrong_length_is_refused():
    model, given = tiny_model(), conditions(4)
    with pytest.raises(ValueError, match=f"blocks of {4 * BLOCK} video frames"):
        next(rollout(model, given, [BlockSpan(0, 0, BLOCK - 1)], sampling=Sampling(settings(), NoiseSource(seeded()))))
