"""Plug-ins: modules of the user that register variants when they are imported, in this process and in those that it starts."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from sonic.registry import Registry, require

VARIABLE = "SONIC_PLUGINS"  # the modules in the environment of the processes that this one starts, which import them with `sonic`


def load_plugins(modules: Sequence[str]) -> None:
    """Import modules that register samplers, objectives or other variants; processes that are started later import them first.

    A module is installed, or lies in the current folder. Raises ValueError for one that is missing, fails or registers nothing.
    """
    for name in modules:
        _load(name)
    if modules:
        os.environ[VARIABLE] = ",".join(dict.fromkeys([*_inherited(), *modules]))


def import_inherited() -> None:
    """Import the plug-ins of the process that started this one, which has checked them."""
    for name in _inherited():
        _import(name)


def _inherited() -> list[str]:
    return [name for name in os.environ.get(VARIABLE, "").split(",") if name]


def _import(name: str) -> None:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # as the last folder, where it hides no package
    import_module(name)


def _load(name: str) -> None:
    """Import one module and check that it is a plug-in."""
    imported, before = name in sys.modules, Registry.additions
    require(all(part.isidentifier() for part in name.split(".")), f"plugins={name} is not the name of a module; write it as my.package")
    try:
        _import(name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            raise ValueError(f"plugins={name}: there is no module {error.name}; install its package, or start in its folder") from error
        raise ValueError(f"plugins={name} fails: {type(error).__name__}: {error}; SONIC_DEBUG=1 shows where") from error
    registered = Registry.additions > (0 if imported else before)
    require(registered, f'plugins={name} registers nothing; it needs a line such as SAMPLERS["mine"] = ..., see docs/extending.md')
