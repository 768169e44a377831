"""launch/slurm.sh with stand-ins for the cluster's commands that print their arguments."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "launch/slurm.sh"


@pytest.mark.parametrize(("node", "first"), [({"SLURM_CPUS_ON_NODE": "96"}, ["--cpus-per-task=96"]), ({}, [])])
def test_every_node_gets_a_torchrun_with_its_cores_that_meets_on_the_first(node, first, tmp_path):
    for name, script in {"scontrol": "printf 'node7\\nnode8\\n'", "srun": 'printf "%s\\n" "$@"'}.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_ID": "42", **node}
    outside = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environ = {**outside, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": "/clone", **job}
    arguments = ["parallel=fsdp", "parallel.replicas=2", "prompt=a calm person"]
    done = subprocess.run(["bash", str(SCRIPT), *arguments], capture_output=True, text=True, check=True, env=environ)
    words = done.stdout.splitlines()
    assert words[: 2 + len(first)] == ["--kill-on-bad-exit=1", *first, "torchrun"]
    pairs = dict(zip(words, words[1:], strict=False))
    assert (pairs["--nnodes"], pairs["--nproc-per-node"], pairs["--rdzv-endpoint"]) == ("2", "4", "node7:29500")
    assert words[-4:] == ["/clone/launch/infer.py", *arguments]
