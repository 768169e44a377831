"""The commands launch/convert.py and launch/infer.py in this process, on miniature downloads."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

from main_job import ROOT, launcher
from safetensors.torch import load_file
from torch import Tensor

from sonic.app import run_command
from sonic.checkpoint.tensor_files import survey_sharded

PROMPT = "a person speaks to the camera"


def convert_launcher() -> ModuleType:
    """The file launch/convert.py as a module."""
    spec = importlib.util.spec_from_file_location("launch_convert", ROOT / "launch/convert.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def convert(*argv: str) -> int:
    """The exit code of a conversion."""
    module = convert_launcher()
    return run_command(module.ENTRY, module.convert, module.spelled(list(argv)))


def infer(folder: Path, *argv: str) -> int:
    """The exit code of a film; its papers lie in folder/runs."""
    module = launcher()
    return run_command(module.ENTRY, module.infer, ["device=cpu", f"run.folder={folder / 'runs'}", *argv])


def tensors_of(folder: Path, stem: str) -> dict[str, Tensor]:
    """All tensors of a folder of shards."""
    files = {stored.file for stored in survey_sharded(folder, stem).values()}
    return {name: tensor for file in files for name, tensor in load_file(file).items()}
