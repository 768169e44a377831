"""Loading on four ranks takes the memory of one checkpoint, not of four: no rank ever holds more than its own part."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from plan_case import CPU
from ranks import on_ranks
from safetensors.torch import save_file
from tiny import tiny_config

from sonic.checkpoint.load import shapes_of, without_memory
from sonic.checkpoint.lora import NO_LORA
from sonic.checkpoint.weights import to_official
from sonic.config import ModelConfig
from sonic.parallel import parallelize
from sonic.parallel.context import context_of
from sonic.parallel.mesh import make_world
from sonic.parallel.parallel_config import PLANS, ParallelConfig
from sonic.parallel.parallelize import build_parallel_model

RANKS, FILES, MIB = 4, 3, 2**20
SAMPLE_S = 0.002


def deep_config() -> ModelConfig:
    """A model as deep as the 14B, so that replicated weights have the same share of all weights; 245 MiB in float32."""
    config = tiny_config()
    trunk = replace(config.trunk, hidden_dim=320, ffn_dim=864, num_heads=4, num_layers=40)
    return replace(config, trunk=trunk, audio=replace(config.audio, inject_layers=list(range(0, 40, 4))))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A checkpoint in several files."""
    folder = tmp_path_factory.mktemp("checkpoint")
    shapes = shapes_of(without_memory(deep_config()))
    rng, names = torch.Generator().manual_seed(0), list(shapes)
    for index in range(FILES):
        stored = {to_official(name): torch.rand(shapes[name], generator=rng) for name in names[index::FILES]}
        save_file(stored, folder / f"model-{index}.safetensors")
    return folder


def private_memory() -> int:
    """Bytes of this process's memory that are not backed by a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


@contextmanager
def sampled() -> Iterator[list[int]]:
    """Samples of the private memory, taken in the background."""
    seen, ended = [private_memory()], threading.Event()

    def sample() -> None:
        while not ended.wait(SAMPLE_S):
            seen.append(private_memory())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()
        seen.append(private_memory())


def growth(parallel: ParallelConfig, checkpoint: Path) -> tuple[int, int]:
    """How much the private memory of this rank grows from the empty model, cut for this rank, to the model with its weights; and
    the same at the worst moment on the way."""
    name = PLANS[parallel.name].parallelizer
    world, plan, before = make_world(parallel, parallel.name, CPU), getattr(parallelize, name), []

    def allocate(*arguments) -> None:
        dist.barrier()
        before.append(private_memory())
        plan.allocate(*arguments)

    with patch.object(parallelize, name, plan._replace(allocate=allocate)), sampled() as seen:
        model = build_parallel_model(deep_config(), checkpoint, context_of(world, parallel), lora=NO_LORA, dtype=torch.float32)
        dist.barrier()
    assert next(model.parameters()).device == CPU  # the model is still there when memory is read
    return seen[-1] - before[0], max(seen) - before[0]


PARALLEL = {
    "fsdp": ParallelConfig("fsdp", unshard_unit="block"),
    "pipeline": ParallelConfig("pipeline"),
    "fsdp and context": ParallelConfig("fsdp", unshard_unit="block", context=2),
}


@pytest.mark.parametrize("plan", PARALLEL)
def test_all_ranks_together_take_the_memory_of_one_checkpoint(plan, checkpoint):
    size = sum(path.stat().st_size for path in checkpoint.iterdir())
    ends, peaks = zip(*on_ranks(RANKS, growth, PARALLEL[plan], checkpoint, timeout_s=240), strict=True)
    figures = f"{[end // MIB for end in ends]} MiB, at worst {[peak // MIB for peak in peaks]}, of {size // MIB}"
    assert 0.95 * size < sum(ends), figures  # otherwise nothing was measured
    assert sum(peaks) <= 1.05 * size, figures
