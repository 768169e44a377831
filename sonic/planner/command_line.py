"""Writes the command line that runs a plan: one process, torchrun on a machine, or Slurm's sbatch on several."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from sonic.parallel.parallel_config import HardwareConfig
from sonic.planner.plans import Plan
from sonic.system.program import data_root, written

PLANNING = ("hardware", "verify", "json")  # options that only the planner has, or that describe the machine
OF_TRAININGS = ("parallel", "video")  # options of a planned training that its job has under speed.*, or that its clips decide
SETTLED = (
    "parallel",
    *(f"parallel.{name}" for name in ("context", "cpu_offload", "offload.kv", "offload.store")),
    "offload.kv",
    "offload.store",
)


def command_line(asked: Sequence[str], plan: Plan, hardware: HardwareConfig, *, changes: Sequence[str] = ()) -> str:
    """The command line that runs a plan: the options that were given to the planner, `changes` to them, and those that select the plan."""
    training = plan.unit == "step"
    chosen = [*changes, *plan.options]
    out = (*PLANNING, *(OF_TRAININGS if training else ()))
    chosen = [word for place, word in enumerate(chosen) if _key(word) not in map(_key, chosen[place + 1 :])]
    set_anew = {*map(_key, chosen), *SETTLED}
    words = [*(word for word in asked if _key(word) not in set_anew), *chosen]
    kept = [word for word in words if _key(word).partition(".")[0] not in out]
    return " ".join([_starter("train" if training else "infer", len(plan.ranks), hardware), shlex.join(kept)])


def _starter(command: str, ranks: int, hardware: HardwareConfig) -> str:
    """The words in front of the options, which start this many ranks."""
    devices, nodes = hardware.devices, hardware.nodes
    if ranks <= devices:
        return written(command, starter=f"torchrun --nproc-per-node={ranks}" if ranks > 1 else "")
    script = Path(sys.argv[0]).with_name("slurm.sh")
    script = script if script.is_file() else data_root() / "launch/slurm.sh"
    if script.is_file():
        processes, gpus = (f"RANKS_PER_NODE={devices} ", 0) if hardware.name == "cpu" else ("", devices)
        return f"{processes}sbatch --nodes={nodes} --gpus-per-node={gpus} {shlex.quote(str(script))} {command}"
    meeting = "--rdzv-backend=c10d --rdzv-endpoint=HOST:29500 --rdzv-id=1"  # on every machine, HOST is one of them
    return written(command, starter=f"torchrun --nnodes={nodes} --nproc-per-node={devices} {meeting}")


def _key(word: str) -> str:
    """The name of the option or choice that a word of a command line sets."""
    return word.lstrip("+").partition("=")[0]
