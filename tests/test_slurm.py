"""launch/slurm.sh with a cluster that only says what it was told."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "launch/slurm.sh"


def test_every_node_gets_a_torchrun_that_meets_on_the_first(tmp_path):
    for name, said in {"scontrol": "printf 'node7\\nnode8\\n'", "srun": 'printf "%s\\n" "$@"'}.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{said}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_ID": "42"}
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": "/clone", **job}
    told = ["parallel=fsdp", "parallel.replicas=2", "prompt=a calm person"]
    done = subprocess.run(["bash", str(SCRIPT), *told], capture_output=True, text=True, check=True, env=environ)
    words = done.stdout.splitlines()
    assert words[1] == "torchrun"
    pairs = dict(zip(words, words[1:], strict=False))
    assert (pairs["--nnodes"], pairs["--nproc-per-node"], pairs["--rdzv-endpoint"]) == ("2", "4", "node7:29500")
    assert words[-4:] == ["/clone/launch/infer.py", *told]
