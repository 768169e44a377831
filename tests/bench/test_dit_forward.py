"""The benchmark of a forward pass: size of its model, operations of its floor, and the written figures."""

from __future__ import annotations

import json
from dataclasses import replace

import torch

from sonic.bench import dit_forward
from sonic.bench.dit_forward import LATENT_FRAMES, MEDIUM, needed
from sonic.cli import Entry, run_command
from sonic.commands import bench_command
from sonic.config import AudioConfig, TextConfig, TrunkConfig
from sonic.inference.infer_config import BenchConfig
from sonic.model.counts import forward_multiply_adds, memory_tokens, weights

GRID = (12, 16)
SMALL = replace(
    MEDIUM,
    trunk=TrunkConfig(24, 32, 2, 2, [1, 2, 2], freq_dim=16),
    audio=AudioConfig(6, 2, 2, [1]),
    text=TextConfig(5, 3),
    rollout=MEDIUM.rollout,
)
FIGURES = ("fp32_ms", "bf16_ms", "fp32_floor_ms", "bf16_floor_ms", "peak_rss_gib")


def test_the_timed_model_has_the_size_that_others_were_timed_at():
    assert round(weights(MEDIUM) / 1e6, 1) == 49.5
    assert LATENT_FRAMES * 12 * 16 + memory_tokens(MEDIUM, GRID, motion=True) == 2016


def test_the_floor_is_all_arithmetic_of_a_forward_and_no_more():
    counted = sum(each.multiply_adds for each in needed(MEDIUM, LATENT_FRAMES, GRID))
    assert counted == forward_multiply_adds(MEDIUM, LATENT_FRAMES, GRID, motion=True)


def test_figures_of_both_precisions_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(dit_forward, "MEDIUM", SMALL)
    threads = torch.get_num_threads()
    argv = ["target=dit_medium", f"json={tmp_path / 'out.json'}", "repeats=1", "run.threads=1", f"run.folder={tmp_path}"]
    assert run_command(Entry("bench", BenchConfig), bench_command.bench, argv) == 0
    torch.set_num_threads(threads)
    figures = json.loads((tmp_path / "out.json").read_text())
    assert all(figures[name] > 0 for name in FIGURES)
