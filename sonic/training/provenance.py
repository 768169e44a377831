"""Where the results of a run come from: whole config, command, git commit and changes, hardware and versions; never the environment."""

from __future__ import annotations

import json
import logging
import os
import platform
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from sonic import __version__
from sonic.planner.hardware import host_bytes
from sonic.system.files import write_json
from sonic.system.nvidia import driver_version
from sonic.system.program import data_root
from sonic.system.run_folder import git
from sonic.training.lineage import Artifact

LOG = logging.getLogger(__name__)
PACKAGES = (
    *("torch", "numpy", "einops", "safetensors", "diffusers", "transformers", "deepspeed", "accelerate", "xformers", "triton"),
    *("hydra-core", "av", "librosa", "wandb", "tensorboard"),
)
MOST_DIFF, MOST_NAMES = 4 << 20, 50  # bytes of changes that are kept, and names of files that git does not know
FACTS, DIFF = "provenance", "git_diff"  # files in the run folder: of the first start, then FACTS-2, ...


def provenance(config: Any, *, command: str, commit: str) -> dict[str, Any]:
    """The config, and under "provenance" the command, the code and the machine."""
    where = {"command": command, "commit": commit, "hardware": hardware(), "versions": versions()}
    return json.loads(json.dumps({**asdict(config), "provenance": where}, default=str))


def keep_provenance(facts: dict[str, Any], folder: Path) -> Artifact:
    """Write the facts and the changes of files that git knows into the run folder, beside those of earlier starts. Returns them as the
    code that the run uses. Of files that git does not know, only names are kept."""
    count = 1 + len(list(folder.glob(f"{FACTS}*.json")))
    ending, where, files = f"-{count}" if count > 1 else "", facts["provenance"], []
    if where["commit"].endswith("+changes"):
        root, diff = data_root(), folder / f"{DIFF}{ending}.patch"
        git(root, "diff", "HEAD", "--binary", "--no-color", "--no-ext-diff", "--no-textconv", f"--output={diff.absolute()}")
        if diff.is_file() and diff.stat().st_size <= MOST_DIFF:
            files.append(diff)
        else:
            diff.unlink(missing_ok=True)
            LOG.warning("the changes of files that git knows are not kept: they are more than %d MiB, or git does not say", MOST_DIFF >> 20)
        where["untracked"] = git(root, "ls-files", "--others", "--exclude-standard").splitlines()[:MOST_NAMES]
    write_json(facts, folder / f"{FACTS}{ending}.json")
    return Artifact("code", "code", {"commit": where["commit"]}, where["versions"], [*files, folder / f"{FACTS}{ending}.json"])


def hardware() -> dict[str, Any]:
    """Processor, cores, main memory, and the GPUs of this machine with their memory and driver."""
    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(host_bytes() / 2**30, 1),
        "gpus": [{"name": gpu.name, "memory_gib": round(gpu.total_memory / 2**30, 1)} for gpu in gpus],
        "driver": driver_version() if gpus else "",
    }


def cpu_name() -> str:
    """The name of the processor."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of sonic, Python, CUDA, cuDNN and the packages that results depend on, as far as they are installed."""
    found = {"sonic": __version__, "python": platform.python_version(), "system": platform.platform()}
    found |= {"cuda": torch.version.cuda or "", "cudnn": str(torch.backends.cudnn.version() or "")}
    installed = {each.metadata["Name"].lower() for each in metadata.distributions()}
    return found | {name: metadata.version(name) for name in PACKAGES if name in installed}
