"""Stands in for the wandb package and keeps what it is given: W&B's own files are W&B's to test."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from io import StringIO
from pathlib import Path
from types import ModuleType, SimpleNamespace


class RecordedRun:
    """A run: what it was opened with, the figures of each step in order, the choices, artifacts that it used and made, and how it ended."""

    def __init__(self, keywords: dict) -> None:
        self.keywords, self.logged, self.choices, self.exit_code = keywords, [], {}, None
        self.used, self.made, self.offline, self.summary = [], [], False, {}
        self.use_artifact, self.log_artifact = self.used.append, self.made.append
        self.config = SimpleNamespace(update=lambda choices, allow_val_change: self.choices.update(choices))

    def log(self, values: dict, step: int | None = None) -> None:
        assert self.exit_code is None
        self.logged.append((step, values))

    def finish(self, exit_code: int = 0) -> None:
        self.exit_code = exit_code


class RecordedArtifact:
    """An artifact: name, type, metadata, and its files' names."""

    def __init__(self, name: str, type: str, metadata: dict) -> None:
        self.name, self.type, self.metadata, self.files = name, type, metadata, []

    def new_file(self, name: str) -> StringIO:
        self.files.append(name)
        return StringIO()

    def add_file(self, path: str, name: str) -> None:
        if not Path(path).is_file():
            raise ValueError(f"Path is not a file: {path!r}")  # in W&B's words
        self.files.append(name)

    def add_reference(self, address: str, name: str) -> None:
        self.files.append(address)


def record_wandb(monkeypatch) -> list[RecordedRun]:
    """The runs that are opened from here on, in order."""
    runs: list[RecordedRun] = []
    module = ModuleType("wandb")
    module.__spec__ = ModuleSpec("wandb", None)
    module.init = lambda **keywords: runs.append(RecordedRun(keywords)) or runs[-1]
    module.Settings = SimpleNamespace
    module.Video = lambda path, format: ("video", path, format)
    module.Artifact = RecordedArtifact
    module.errors = SimpleNamespace(Error=RuntimeError)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return runs
