"""The benchmark of a plan with a published model of random weights: on one rank, on two, and for clips."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import socket
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from official_folder import VAE
from ranks import PRELOAD

from sonic.bench import plan_check
from sonic.cli import Entry, compose
from sonic.config import Ranks
from sonic.inference.infer_config import BenchConfig
from sonic.vae.wan_vae import WanAutoencoder

TINY = [
    "target=fit",
    "model.trunk.hidden_dim=48",
    "model.trunk.ffn_dim=64",
    "model.trunk.num_heads=2",
    "model.trunk.num_layers=4",
    "model.audio.inject_layers=[0,2]",
    "model.text.text_len=8",
    "model.text.text_dim=16",
    "video.size=64x64",
    "fit.blocks=2",
    "fit.warm_blocks=1",
    "device=cpu",
    "run.dtype=float32",
]


def measured(*overrides: str, rank: int = 0, world: int = 1) -> dict:
    """Figures of rank `rank` of `world` ranks."""
    config = compose(Entry("bench", BenchConfig), ["preset=fast_preview", *TINY, *overrides])
    with patch.object(plan_check, "WanAutoencoder", lambda shape: WanAutoencoder(VAE)):
        return plan_check.bench_fit(config, 0.0, ranks=Ranks(rank, world, rank, world))


def job(rank: int, port: int, folder: Path) -> None:
    """One of two ranks."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    figures = measured("model=live_avatar_14b", "parallel=pipeline", rank=rank, world=2)
    (folder / f"{rank}.json").write_text(json.dumps(figures))


def test_two_ranks_measure_and_only_the_first_gives_figures(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
    processes = [context.Process(target=job, args=(rank, port, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
    figures, nothing = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert nothing == {}
    assert figures["plan"] == "pipeline"
    assert len(figures["measured_gib_per_rank"]) == len(figures["predicted_gib_per_rank"]) == 2
    assert figures["frames_per_second"] > 0


@pytest.mark.parametrize("overrides", [("model=live_avatar_14b",), ("model=wan_s2v_14b", "sampler.sample_steps=2")])
def test_one_rank_measures_blocks_and_clips(overrides):
    figures = measured(*overrides)
    assert figures["plan"] == "single"
    assert len(figures["measured_gib_per_rank"]) == len(figures["predicted_gib_per_rank"]) == 1
    assert min(figures[name] for name in ("seconds_per_block", "seconds_per_step", "frames_per_second", "tflops", "gemm_share")) > 0
    assert figures["seconds_per_block"] >= figures["seconds_per_step"]


def test_bench_fit_refuses_the_preview():
    with pytest.raises(ValueError, match="bench preview"):
        measured("model=preview", "model.resolution=96")
