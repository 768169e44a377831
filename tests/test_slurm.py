"""launch/slurm.sh on stand-ins for the cluster: srun starts a process for every node, scontrol writes down what it is asked."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sonic.data.clips import write_index
from sonic.main import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "launch/slurm.sh"
PATIENCE_S = 400
PRINTS = """printf '%s\\n' "$@" """
SRUN = """
for word; do case $word in --ntasks=*) count=${word#*=} ;; esac; done
while [[ $1 == --* ]]; do shift; done
nodes=()
trap 'kill -USR1 "${nodes[@]}"' USR1
for _ in $(seq "$count"); do "$@" & nodes+=($!); done
code=0
for node in "${nodes[@]}"; do
    while true; do
        wait "$node" && one=0 || one=$?
        kill -0 "$node" 2>/dev/null || break
    done
    [ "$one" = 0 ] || code=$one
done
exit "$code"
"""
SCONTROL = """
echo "$*" >>"$(dirname "$0")/asked"
[ "$1" != requeue ] || exit "${REFUSED:-0}"
printf 'localhost\\nother\\n'
"""


@pytest.fixture
def cluster(tmp_path):
    """Starts slurm.sh as a job of two nodes of one rank, in an empty folder; `srun` and `python` are scripts, `job` variables of Slurm."""
    programs, started = tmp_path / "programs", []
    programs.mkdir()
    (tmp_path / "here").mkdir()

    def start(*arguments: str, srun: str = SRUN, python: str = f'exec {sys.executable} "$@"', **job: str) -> subprocess.Popen:
        for name, script in {"scontrol": SCONTROL, "srun": srun, "python": python}.items():
            (programs / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
            (programs / name).chmod(0o755)
        slurm = {"SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2", **job}
        outside = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        environ = {**outside, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **slurm}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(
            subprocess.Popen(["bash", str(SCRIPT), *arguments], env=environ, cwd=tmp_path / "here", start_new_session=True, **pipes)
        )
        return started[-1]

    start.asked = lambda: (programs / "asked").read_text().splitlines()
    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def words_of(process: subprocess.Popen) -> list[str]:
    """What the stand-in for srun was called with, one word a line."""
    text = process.communicate(timeout=PATIENCE_S)[0]
    assert process.returncode == 0, text
    return text.splitlines()


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


@pytest.mark.parametrize(
    ("job", "ranks"), [({"SLURM_GPUS_ON_NODE": "4"}, "4"), ({}, "1"), ({"RANKS_PER_NODE": "6", "SLURM_GPUS_ON_NODE": "8"}, "6")]
)
def test_every_node_gets_a_torchrun_with_a_rank_for_each_gpu_that_meets_on_the_first(job, ranks, cluster):
    arguments = ["parallel=fsdp", "parallel.replicas=2", "prompt=a calm person"]
    words = words_of(cluster("infer", *arguments, srun=PRINTS, SLURM_CPUS_ON_NODE="96", **job))
    assert {"--nodes=2", "--ntasks=2", "--kill-on-bad-exit=1", "--cpus-per-task=96"} <= set(words)
    assert (option(words, "--nnodes"), option(words, "--nproc-per-node"), option(words, "--rdzv-id")) == ("2", ranks, "42")
    assert option(words, "--rdzv-endpoint") == "localhost:20042"
    assert words[-6:] == ["-m", "sonic", "infer", *arguments]


def test_jobs_on_one_machine_meet_at_different_ports_and_none_at_one_that_is_taken(cluster):
    with socket.create_server(("127.0.0.1", 20043)):
        found = [option(words_of(cluster("train", srun=PRINTS, SLURM_JOB_ID=number)), "--rdzv-endpoint") for number in ("43", "45")]
    assert found == ["localhost:20044", "localhost:20045"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_a_job(command, cluster):
    words = words_of(cluster(command, "a=1", srun=PRINTS))
    ranks = command in ("train", "infer", "bench")
    assert words[-4:] == ["-m", "sonic", command, "a=1"]
    assert ("torch.distributed.run" in words) == ranks
    assert ("--nodes=2" in words) == ranks
    assert any("have nothing to do" in word for word in words) != ranks


@pytest.mark.parametrize(
    ("arguments", "job", "sentence"),
    [
        (["trian"], {}, f"trian is no command; choose one of: {', '.join(COMMANDS)}"),
        ([], {}, "name a command"),
        (
            ["train", "+train=preview_dit"],
            {"SLURM_JOB_ID": ""},
            "this is no Slurm job; start it with: sbatch --nodes=2 launch/slurm.sh train",
        ),
    ],
)
def test_what_cannot_run_is_refused_in_a_sentence(arguments, job, sentence, cluster):
    process = cluster(*arguments, **job)
    text = process.communicate(timeout=PATIENCE_S)[0]
    assert process.returncode == 2
    assert sentence in text and len(text.splitlines()) == 1


WAITS = """
trap 'echo got USR1 >>"$(dirname "$0")/got"; exit 138' USR1
trap 'echo got TERM >>"$(dirname "$0")/got"; exit 143' TERM
: | sleep 1 # until those that started this have noted its number
: >"$(dirname "$0")/started"
while true; do read -r -t 0.1 <> <(:) || true; done
"""


@pytest.mark.parametrize(
    ("command", "job", "code", "requeued", "sentence"),
    [
        ("ablate", {}, 0, 1, "goes back into the queue"),
        ("ablate", {"REFUSED": "1"}, 143, 1, "Slurm did not take job 42 back"),
        ("evaluate", {}, 143, 0, "evaluate starts from its beginning each time"),
    ],
)
def test_at_the_end_of_the_time_a_job_that_can_continue_goes_back_into_the_queue_once(
    command, job, code, requeued, sentence, cluster, tmp_path
):
    process = cluster(command, python=WAITS, **job)
    until(lambda: (tmp_path / "programs/started").exists(), process)
    process.send_signal(signal.SIGUSR1)
    text = process.communicate(timeout=PATIENCE_S)[0]
    assert (process.returncode, sentence in text) == (code, True), text
    assert (tmp_path / "programs/got").read_text() == "got TERM\n"
    asked = tmp_path / "programs/asked"
    assert (asked.read_text().count("requeue 42") if asked.exists() else 0) == requeued


@pytest.mark.parametrize("code", [0, 1, 2])
def test_without_a_signal_the_exit_code_is_the_commands_and_nothing_goes_back(code, cluster, tmp_path):
    process = cluster("evaluate", python=f"exit {code}")
    process.communicate(timeout=PATIENCE_S)
    assert process.returncode == code
    assert not (tmp_path / "programs/asked").exists()


def test_a_training_that_goes_back_into_the_queue_ends_with_the_weights_of_one_that_did_not(cluster, tmp_path):
    rng = torch.Generator().manual_seed(0)
    clips = tmp_path / "here/clips"
    clips.mkdir()
    names = [f"c{number}" for number in range(4)]
    sizes = {"mel": (48, 40), "visemes": (24, 5)}
    save_file(
        {f"{name}/{part}": torch.rand(size, generator=rng) for name in names for part, size in sizes.items()}, clips / "a.safetensors"
    )
    write_index(clips, [{"name": name, "shard": "a.safetensors", "latent_frames": 6, "tensors": list(sizes)} for name in names], seed=7)
    options = ["objective=viseme", "data.folder=clips", "data.window=6", "checkpoint.every_steps=2", "log.bar=false"]
    options += ["budget.max_steps=20", "budget.batch_size=2", "budget.accumulate=2"]
    job = lambda name: cluster("train", *options, f"name={name}", f"export={name}.safetensors")  # noqa: E731
    first = job("stopped")
    until(lambda: any((tmp_path / "here/runs/stopped").rglob("*step*/*")), first)
    first.send_signal(signal.SIGUSR1)
    text = first.communicate(timeout=PATIENCE_S)[0]
    assert first.returncode == 0 and cluster.asked().count("requeue 42") == 1, text
    assert not (tmp_path / "here/stopped.safetensors").exists()
    stopped = int(re.search(r"saved step (\d+); the same command continues", text)[1])
    assert 0 < stopped < 20
    for name in ("stopped", "straight"):
        process = job(name)
        text = process.communicate(timeout=PATIENCE_S)[0]
        assert process.returncode == 0, text
        assert (f"at step {stopped}, after" in " ".join(text.split())) == (name == "stopped"), text  # else it began anew
    assert cluster.asked().count("requeue 42") == 1
    one, other = (load_file(tmp_path / f"here/{name}.safetensors") for name in ("stopped", "straight"))
    assert all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


def until(done, process: subprocess.Popen) -> None:
    """Wait until `done()`, or fail with what the process has said when it ends before."""
    began = time.monotonic()
    while not done():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < began + PATIENCE_S
        time.sleep(0.02)
