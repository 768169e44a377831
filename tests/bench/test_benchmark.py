"""The command bench: its table of benchmarks, the video that it times, and the figures that it writes."""

from __future__ import annotations

import json

import pytest

from sonic.bench import benchmark
from sonic.cli import compose
from sonic.commands.bench_command import ENTRY, with_target
from sonic.config import Ranks


def test_the_preview_is_timed_on_a_video_of_the_asked_size_and_length(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "gemm_fraction", lambda config, dtype: config.trunk.hidden_dim)  # timed in test_forward_time.py
    options = ["timing.photo=240x160", "timing.seconds=0.5", "timing.gemm_dim=256", "repeats=1", f"json={tmp_path / 'out.json'}"]
    found = benchmark.bench(compose(ENTRY, with_target(["preview", *options])), 0.0, ranks=Ranks())
    assert json.loads((tmp_path / "out.json").read_text()) == found
    assert found["video"].startswith("240x160, 12 frames") and found["gemm_fraction_bf16"] == 256
    assert min(found[name] for name in ("frames_per_second", "first_frame_s", "first_frame_warm_s", "load_s", "peak_rss_gib")) > 0


def test_only_a_plan_is_timed_on_several_ranks():
    with pytest.raises(ValueError, match="bench preview times one process; 2 ranks are for bench fit"):
        benchmark.bench(compose(ENTRY, with_target(["preview"])), 0.0, ranks=Ranks(0, 2, 0, 2))
