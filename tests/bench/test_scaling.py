"""The benchmark of two ranks against one: its runs and its figures."""

from __future__ import annotations

from sonic.bench import scaling
from sonic.inference.infer_config import BenchConfig


def test_the_best_run_of_each_counts_and_both_make_the_same_video(monkeypatch):
    speeds, calls = iter([10.0, 18.0, 12.0, 15.0]), []
    monkeypatch.setattr(scaling, "_frames_per_second", lambda ranks, *more: calls.append((ranks, *more)) or next(speeds))
    found = scaling.bench_scaling(BenchConfig(target="scaling", repeats=2), 0.0)
    assert found["ratio"] == 1.5
    assert [each[0] for each in calls] == [1, 2, 1, 2]
    assert {each[-2:] for each in calls} == {("fit.blocks=8", "fit.warm_blocks=2")}


def test_a_real_run_gives_a_rate(monkeypatch):
    small = {"hidden_dim": 48, "ffn_dim": 64, "num_heads": 2, "num_layers": 2}
    stream = [each for each in scaling.STREAM if not any(name in each for name in small)]
    stream += [f"model.trunk.{name}={value}" for name, value in small.items()] + ["model.audio.inject_layers=[0]", "video.size=64x64"]
    monkeypatch.setattr(scaling, "STREAM", tuple(stream))
    assert scaling._frames_per_second(1, "parallel=single", "fit.blocks=1", "fit.warm_blocks=1") > 0
