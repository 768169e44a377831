"""KV rings in host memory on a (fake) CUDA device: what is copied each forward, and that the host waits for none of it."""

from __future__ import annotations

import torch
from fake_cuda import CUDA, fake_cuda_mode, on_cuda
from tiny import conditions, spans_of, tiny_config

from sonic.config import SamplerConfig
from sonic.inference.rollout import NoiseSource, Sampling, rollout
from sonic.model.dit import AvatarDiT
from sonic.model.embed import motion_positions
from sonic.parallel.context import DistributedContext
from sonic.parallel.mesh import World
from sonic.parallel.offload import load_before_use
from sonic.parallel.parallel_config import OffloadConfig, ParallelConfig
from sonic.types import Conditions

BLOCKS, STEPS = 5, 2


def asked_by_the_last_block() -> tuple[int, dict, int]:
    """Bytes that host_rings.py copies for the last block of a video, its waits, and the bytes that a token takes in a ring."""
    with torch.device("meta"):
        model = AvatarDiT(tiny_config())
    options = OffloadConfig(resident_gib=100, inflight=1, kv="host")
    world, parallel = World("offload", CUDA), ParallelConfig("offload", offload=options)
    with fake_cuda_mode() as record, torch.no_grad():
        context = DistributedContext(world, parallel, load_before_use(on_cuda(model), world, parallel))
        given = Conditions(**{name: value.to(CUDA) for name, value in vars(conditions(2 * BLOCKS)).items() if value is not None})
        sampling = Sampling(SamplerConfig(name="euler", schedule="linear", sample_steps=STEPS), NoiseSource(torch.Generator()))
        for _ in rollout(model, given, spans_of(BLOCKS), sampling=sampling, context=context):
            copied = sum(size for line, size in record.copies.items() if line.startswith("host_rings.py"))
            waits = {line: count for (_, line), count in record.waits.items() if line.startswith("host_rings.py")}
            record.clear()
    return copied, waits, model.config.trunk.hidden_dim * 4 * len(model.blocks) * STEPS


def test_fake_cuda_copies_a_ring_once_for_each_layer_and_waits_for_nothing(fake_cuda):
    copied, waits, token_bytes = fake_cuda(asked_by_the_last_block)
    size = 16  # patches of a latent frame
    memory, block = size + len(motion_positions(tuple(tiny_config().motion.buckets), 4, 4)[0]), 2 * size
    to_device, to_host = 2 * (memory + block) + size, 2 * block  # keys and values of memory and of the other block; the reference's keys
    assert waits == {}
    assert copied == token_bytes * (to_device + to_host)
