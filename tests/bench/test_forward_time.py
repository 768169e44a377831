"""The benchmarks of a forward pass: counted multiply-adds, the size of the model, the floor, and the written figures."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from tiny import BLOCK, SIZE, conditions, tiny_config, tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sonic.bench import forward_time
from sonic.bench.forward_time import CLIP, MEDIUM, PAST_LATENTS, ClipForward, fastest, gemm_fraction
from sonic.cli import Entry, run_command
from sonic.commands import bench_command
from sonic.config import AudioConfig, TextConfig, TrunkConfig
from sonic.geometry import BlockSpan
from sonic.inference.infer_config import BenchConfig
from sonic.model.attention import sdpa
from sonic.model.counts import block_multiply_adds, forward_multiply_adds, memory_tokens, weights

GRID, MEDIUM_GRID = (SIZE[0] // 4, SIZE[1] // 4), (12, 16)
SMALL = replace(
    MEDIUM,
    trunk=TrunkConfig(24, 32, 2, 2, [1, 2, 2], freq_dim=16),
    audio=AudioConfig(6, 2, 2, [1]),
    text=TextConfig(5, 3),
    rollout=MEDIUM.rollout,
)
FIGURES = ("fp32_ms", "bf16_ms", "fp32_floor_ms", "bf16_floor_ms", "fp32_over_floor", "bf16_over_floor", "peak_rss_gib")


def counted(run) -> int:
    """Multiply-adds by torch's own counter, on kernels that it knows."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.backends.mkldnn.flags(enabled=False):
        run()
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("motion", [None, 3])
def test_the_count_of_a_forward_is_what_torch_counts(motion):
    model, given = tiny_model(), conditions(6, motion=motion)
    found = counted(lambda: model(torch.randn(1, 4, 6, *SIZE), torch.tensor([500.0]), given))
    assert forward_multiply_adds(model.config, 6, GRID, motion=motion is not None) == found


@pytest.mark.parametrize("blocks", [1, 2])
def test_the_count_of_a_block_is_what_torch_counts(blocks):
    model, given = tiny_model(window_blocks=2).requires_grad_(False), conditions(BLOCK, motion=None)
    cache = model.prefill(given, model.new_cache(given, steps=1))
    latents, level = torch.randn(1, 4, BLOCK, *SIZE), torch.tensor([500.0])
    for index in range(blocks):
        inputs = model.prepare_block(given, BlockSpan(index, index * BLOCK, BLOCK))
        found = counted(lambda inputs=inputs: model.denoise_block(latents, level, inputs, cache=cache, ring=cache.rings[0]))
    assert block_multiply_adds(model.config, GRID, blocks=blocks) == found


def test_the_timed_model_has_the_size_that_others_were_timed_at():
    assert round(weights(MEDIUM) / 1e6, 1) == 49.5
    assert CLIP[0] * 12 * 16 + memory_tokens(MEDIUM, MEDIUM_GRID, motion=True) == 2016


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_floor_is_all_arithmetic_of_a_forward_and_no_more(dtype):
    forward = ClipForward(SMALL, dtype, CLIP, past=PAST_LATENTS)
    assert counted(forward.floor()) == forward_multiply_adds(SMALL, CLIP[0], MEDIUM_GRID, motion=True)
    assert all(block.self_attention.attention is sdpa for block in forward.model.blocks)


def test_the_jobs_run_in_turns_and_the_fastest_run_of_each_counts(monkeypatch):
    """By a clock that moves by as much as a job takes."""
    turns, seconds, clock = [], {"a": iter([3.0, 1.0, 2.0]), "b": iter([5.0, 7.0, 6.0])}, [0.0]

    def job(name):
        turns.append(name)
        clock[0] += next(seconds[name])

    def timeit(work, number):
        before = clock[0]
        work()
        return clock[0] - before

    monkeypatch.setattr(forward_time, "timeit", timeit)
    monkeypatch.setattr(forward_time.time, "perf_counter", lambda: clock[0])
    jobs = {name: lambda name=name: job(name) for name in "ab"}
    assert fastest(jobs, 2, least_s=17) == {"a": 1.0, "b": 5.0}
    assert turns == ["a", "b"] * 3


def test_the_share_of_a_matrix_product_is_that_of_the_best_rates(monkeypatch):
    """When the square product takes a second, the other one two, and a forward four."""
    config = tiny_config()
    monkeypatch.setattr(forward_time, "fastest", lambda jobs, *_: dict(zip(jobs, (4.0, 1.0, 2.0), strict=True)))
    share = gemm_fraction(config, torch.float32, (3, *SIZE))
    assert share == pytest.approx(forward_multiply_adds(config, 3, GRID) / 4 / 2048**3)


def test_figures_of_both_precisions_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(forward_time, "MEDIUM", SMALL)
    threads = torch.get_num_threads()
    argv = ["target=dit_medium", f"json={tmp_path / 'out.json'}", "repeats=1", "run.threads=1", f"run.folder={tmp_path}"]
    assert run_command(Entry("bench", BenchConfig), bench_command.bench, argv) == 0
    torch.set_num_threads(threads)
    figures = json.loads((tmp_path / "out.json").read_text())
    assert all(figures[name] > 0 for name in FIGURES)
