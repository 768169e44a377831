"""Runs the commands convert and infer in this process, on miniature downloads."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from sonic.checkpoint.tensor_files import survey_sharded
from sonic.cli import run_command
from sonic.commands import convert_command, infer_command

PROMPT = "a person speaks to the camera"


def convert(*argv: str) -> int:
    """Run the command convert; its exit code."""
    return run_command(convert_command.ENTRY, convert_command.convert, list(argv))


def infer(folder: Path, *argv: str) -> int:
    """Run the command infer; its exit code. Results are in folder/runs."""
    return run_command(infer_command.ENTRY, infer_command.infer, ["device=cpu", f"run.folder={folder / 'runs'}", *argv])


def tensors_of(folder: Path, stem: str) -> dict[str, Tensor]:
    """All tensors of a folder of shards."""
    files = {stored.file for stored in survey_sharded(folder, stem).values()}
    return {name: tensor for file in files for name, tensor in load_file(file).items()}
