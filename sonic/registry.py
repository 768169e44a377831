"""Registries: variants by name. The options that choose among them, and the errors for names that are not there. Imports nothing heavy."""

from __future__ import annotations

import ast
import difflib
import sys
from collections import UserDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, field
from pathlib import Path
from typing import ClassVar, TypeVar

T = TypeVar("T")


class Registry(UserDict[str, T]):
    """Variants by the names that `option` may have. `REGISTRY["mine"] = ...` adds one; a name that is there already is refused."""

    additions: ClassVar[int] = 0  # to all registries, by plug-ins

    def __init__(self, option: str, variants: Mapping[str, T]) -> None:
        super().__init__()
        self.data.update(variants)
        self.option = option

    def __setitem__(self, name: str, variant: T) -> None:
        require(name not in self, f"{self.option}={name} is there already; register yours under another name")
        self.data[name] = variant
        Registry.additions += 1


def option(default, help: str | Callable[[], str] = "", *, table: str = ""):
    """A dataclass field with a default, which is copied if it is a list, and a line for `--help`, which ends with the names in `table`.

    A line that depends on what plug-ins register is a function.
    """
    metadata = {"help": help, "table": table}
    if isinstance(default, type | list):
        return field(default_factory=default if isinstance(default, type) else default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def help_of(option: Field) -> str:
    """The line about an option in `--help`."""
    text, table = option.metadata.get("help", ""), option.metadata.get("table")
    text = text() if callable(text) else text
    return f"{text}: {', '.join(names_in(table))}" if table else text


def names_in(table: str) -> list[str]:
    """The names in a registry, given as MODULE.NAME. While its module is not imported, because that imports torch, its source is read."""
    module, _, name = table.rpartition(".")
    if loaded := sys.modules.get(f"sonic.{module}"):
        return list(getattr(loaded, name))
    source = Path(__file__).parent.joinpath(*module.split(".")).with_suffix(".py").read_text()
    assigned = (node for node in ast.parse(source).body if isinstance(node, ast.AnnAssign))
    entries = next(node.value for node in assigned if ast.unparse(node.target) == name)
    return [ast.literal_eval(key) for key in entries.args[-1].keys]


def closest_first(name: str, choices: Sequence[str]) -> list[str]:
    """All choices, those that resemble `name` first."""
    close = difflib.get_close_matches(str(name), choices, n=max(1, len(choices)), cutoff=0.5)
    return [*close, *(choice for choice in choices if choice not in close)]


def unknown_choice(name: str, choices: Sequence[str], option: str) -> str:
    """The error message for a name that is not among the choices."""
    return f"{option}={name} is unknown; choose one of: {', '.join(closest_first(name, choices))}"


def require(ok: bool, sentence: str) -> None:
    """Raise ValueError(sentence) unless `ok`."""
    if not ok:
        raise ValueError(sentence)


def one_of(name: str, choices: Sequence[str], option: str) -> None:
    """Raise ValueError with the choices unless `name` is one of them."""
    require(name in choices, unknown_choice(name, choices, option))
