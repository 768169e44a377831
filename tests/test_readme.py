"""The README tells of every file and every option, with the defaults as they are."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from sonic.cli import Entry, config_options, groups
from sonic.inference.infer_config import InferConfig

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
ELSEWHERE = ("model.", "hardware.")  # told of where models and the planner are
SHOWN = {
    name: field for name, (_, field) in config_options(InferConfig).items() if not name.startswith(ELSEWHERE) or name == "model.weights"
}


def test_every_file_of_the_library_is_on_the_map():
    tree = README.partition("## The tree")[2].partition("\n## ")[0]
    names = {path.name for path in (ROOT / "sonic").rglob("*.py") if path.name != "__init__.py"}
    assert {name for name in names if name not in tree} == set()
    assert set(re.findall(r"\w+\.py", tree)) <= names | {
        path.name for position in (ROOT, ROOT / "launch") for path in position.glob("*.py")
    }


@pytest.mark.parametrize("name", SHOWN)
def test_every_option_is_in_the_table_with_its_default(name):
    row = next(line for line in README.splitlines() if line.startswith(f"| `{name}` |"))
    default = SHOWN[name].default
    assert row.split("|")[2].strip().strip("`") == ("" if default in (None, "") else str(default))
    assert default is not dataclasses.MISSING


def test_every_command_is_named():
    for path in (ROOT / "launch").glob("*.py"):
        assert path.name in README


def test_every_preset_and_model_is_named():
    found = groups(Entry("infer", InferConfig))
    assert all(f"`{name}`" in README for group in ("preset", "model") for name in found[group])
