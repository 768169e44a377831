"""Speed-up of two ranks over one: the same video on one rank, then on two ranks, with one thread per rank."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path

from sonic.inference.infer_config import BenchConfig
from sonic.system.program import command_words

STREAM = (  # a transformer wide enough for matrix products to dominate, and a video long enough for a steady state
    "model=live_avatar_14b",
    "model.trunk.hidden_dim=512",
    "model.trunk.ffn_dim=2048",
    "model.trunk.num_heads=4",
    "model.trunk.num_layers=16",
    "model.audio.inject_layers=[0,4,8,12]",
    "model.text.text_len=64",
    "video.size=256x256",
    "sampler=euler",
    "sampler.schedule=linear",
    "sampler.sample_steps=4",
    "run.dtype=float32",
    "device=cpu",
    "run.threads=1",
    "fit.vae=false",
    "fit.force=true",  # the planner's estimate includes encoders that are not built here
)
RANKS = 2


def bench_scaling(config: BenchConfig, begun: float) -> dict:
    """Frames per second of `fit.blocks` blocks with parallel=single on one rank and parallel=pipeline on two, and their ratio.

    Both are measured `repeats` times in turns; the best of each counts. Raises RuntimeError when a run fails.
    """
    length = (f"fit.blocks={config.fit.blocks}", f"fit.warm_blocks={config.fit.warm_blocks}")
    alone, together = [], []
    for _ in range(config.repeats):
        alone.append(_frames_per_second(1, "parallel=single", *length))
        together.append(_frames_per_second(RANKS, "parallel=pipeline", "parallel.layers=[8,8]", *length))
    return {
        "ratio": round(max(together) / max(alone), 3),
        "frames_per_second_1_rank": max(alone),
        "frames_per_second_2_ranks": max(together),
        "all_1_rank": alone,
        "all_2_ranks": together,
        "stream": f"{config.fit.blocks} blocks of 12 frames, 256x256, hidden_dim 512, 16 layers, 4 steps, float32, one thread per rank",
    }


def _frames_per_second(ranks: int, *arguments: str) -> float:
    """Frames per second of one run of bench fit in new processes."""
    starter = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "fit.json"
        command = ["env", "OMP_NUM_THREADS=1", *command_words("bench", *starter), "fit", *STREAM, *arguments, f"json={found}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"bench fit on {ranks} ranks ended with exit code {done.returncode}: {done.stderr.strip()[-2000:]}")
        return json.loads(found.read_text())["frames_per_second"]
