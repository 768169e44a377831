"""The benchmark of two ranks against one: its runs and its figures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from sonic.bench import scaling
from sonic.cli import compose
from sonic.commands.bench_command import ENTRY
from sonic.inference.infer_config import BenchConfig
from sonic.parallel.parallel_config import ParallelConfig


def test_one_rank_and_two_make_the_same_stream_and_the_best_of_each_counts(monkeypatch):
    """The commands are composed as the program would, and give a rate at once."""
    rates, made = iter([10.0, 18.0, 12.0, 15.0]), []

    def run(command: list[str], **_) -> SimpleNamespace:
        config = compose(ENTRY, command[command.index("fit") :])
        ranks = next((int(each.partition("=")[2]) for each in command if each.startswith("--nproc-per-node=")), 1)
        made.append((ranks, config))
        Path(config.json).write_text(json.dumps({"frames_per_second": next(rates)}))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(scaling.subprocess, "run", run)
    found = scaling.bench_scaling(BenchConfig(target="scaling", repeats=2), 0.0)
    assert (found["ratio"], found["frames_per_second_1_rank"], found["frames_per_second_2_ranks"]) == (1.5, 12.0, 18.0)
    assert [(ranks, config.parallel.name) for ranks, config in made] == [(1, "single"), (2, "pipeline")] * 2
    single, pipeline = (replace(config, json="", parallel=ParallelConfig()) for _, config in made[:2])
    assert single == pipeline
    assert single.run.threads == 1 and sum(made[1][1].parallel.layers) == single.model.trunk.num_layers


def test_a_real_run_gives_a_rate(monkeypatch):
    small = {"hidden_dim": 48, "ffn_dim": 64, "num_heads": 2, "num_layers": 2}
    stream = [each for each in scaling.STREAM if not any(name in each for name in small)]
    stream += [f"model.trunk.{name}={value}" for name, value in small.items()] + ["model.audio.inject_layers=[0]", "video.size=64x64"]
    monkeypatch.setattr(scaling, "STREAM", tuple(stream))
    assert scaling._frames_per_second(1, "parallel=single", "fit.blocks=1", "fit.warm_blocks=1") > 0
