"""Stands in for the wandb package and keeps what it is given: W&B's own files are W&B's to test."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace


class RecordedRun:
    """A run: what it was opened with, the figures of each step in order, the choices, and how it ended."""

    def __init__(self, keywords: dict) -> None:
        self.keywords, self.logged, self.choices, self.exit_code = keywords, [], {}, None
        self.config = SimpleNamespace(update=lambda choices, allow_val_change: self.choices.update(choices))

    def log(self, values: dict, step: int | None = None) -> None:
        assert self.exit_code is None
        self.logged.append((step, values))

    def finish(self, exit_code: int = 0) -> None:
        self.exit_code = exit_code


def record_wandb(monkeypatch) -> list[RecordedRun]:
    """The runs that are opened from here on, in order."""
    runs: list[RecordedRun] = []
    module = ModuleType("wandb")
    module.init = lambda **keywords: runs.append(RecordedRun(keywords)) or runs[-1]
    module.Settings = SimpleNamespace
    module.Video = lambda path, format: ("video", path, format)
    module.errors = SimpleNamespace(Error=RuntimeError)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return runs
