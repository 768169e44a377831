"""The commands of the program by name; a command's module is imported only when it runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from sonic import __doc__ as ABOUT
from sonic import __version__
from sonic.config import unknown_choice
from sonic.system.program import written

USER_ERROR = 2
COMMANDS = {  # sonic/commands/NAME_command.py runs it
    "infer": "make a talking video of a portrait and a recording",
    "plan": "list the plans that fit on given hardware, with their estimated memory and speed",
    "convert": "convert published checkpoints to the form that this program loads, and back",
    "train": "train or distill a model from a recipe",
    "bundle": "copy exported weights into the package",
    "evaluate": "score a model on drawn faces whose mouth shapes are known exactly",
    "judge": "judge a finished video against its portrait and its recording",
    "ablate": "train, evaluate or plan a grid of options and write a report",
    "precompute": "encode training data once, so that training only reads it",
    "bench": "measure the speed of this machine",
    "check": "check the device of this machine in nine minutes: numbers, speed, memory, errors",
}


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command that the command line (or `argv`) names and leave the process with its exit code."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ("",)
    if name in ("--help", "-h"):
        sys.stdout.write(overview())
        sys.exit(0)
    if name == "--version":
        sys.stdout.write(f"sonic {__version__}\n")
        sys.exit(0)
    if name not in COMMANDS:
        message = unknown_choice(name, list(COMMANDS), "command") if name else f"name a command: {', '.join(COMMANDS)}"
        sys.stderr.write(f"sonic: error: {message}\n")
        sys.exit(USER_ERROR)
    import_module(f"sonic.commands.{name}_command").main(rest)


def overview() -> str:
    """The text of `sonic --help`: every command with a line about it."""
    lines = [f"  {name:<12} {line}" for name, line in COMMANDS.items()]
    program = written("COMMAND")
    usage = f"usage: {program} [choice=name ...] [option=value ...]     {program} --help lists the options of a command"
    return "\n".join([(ABOUT or "").strip().splitlines()[0], "", usage, "", "commands:", *lines, ""])
