"""Every command: fast help without heavy imports, a launch file, and the spelling of commands in messages."""

from __future__ import annotations

import resource
import subprocess
import sys
from importlib import import_module

import pytest
from infer_command import ROOT

from sonic.checkpoint.bundled import BUNDLED, named_weights
from sonic.main import COMMANDS
from sonic.system.program import LAUNCHERS, PACKAGE, interpreter, written

HEAVY = ("torch", "numpy", "transformers", "diffusers", "av", "librosa", "wandb")
HELP = f"""
import sys
from sonic.main import main
try:
    main()
finally:
    heavy = set(sys.modules) & set({HEAVY!r})
    assert not heavy, heavy
"""


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_fast_has_an_example_and_imports_nothing_heavy(name):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([*interpreter(), "-c", HELP, name, "--help"], capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert f"usage: sonic {name} [" in done.stdout and f"example: sonic {name} " in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1  # CPU time of the process itself; usually 0.2 s


def test_every_command_has_a_module_and_a_launch_file_and_there_are_no_others():
    assert {path.stem for path in (ROOT / "launch").glob("*.py")} == {*(LAUNCHERS.get(name, name) for name in COMMANDS), "start"}
    assert {path.stem for path in (PACKAGE / "commands").glob("*_command.py")} == {f"{name}_command" for name in COMMANDS}
    for name in COMMANDS:
        assert import_module(f"sonic.commands.{name}_command").ENTRY.name == name
        assert f'start("{name}")' in (ROOT / f"launch/{LAUNCHERS.get(name, name)}.py").read_text()


@pytest.mark.parametrize(
    ("started", "starter", "expected"),
    [
        ("launch/infer.py", "", "python launch/train.py"),
        ("clone of mine/launch/infer.py", "torchrun", "torchrun 'clone of mine/launch/train.py'"),
        ("venv/bin/sonic", "", "sonic train"),
        ("venv/bin/sonic", "torchrun", "torchrun -m sonic train"),
        (str(PACKAGE / "__main__.py"), "", "python -m sonic train"),
        ("site-packages/pytest/__main__.py", "", "sonic train"),
        ("", "", "sonic train"),
    ],
)
def test_a_command_is_written_as_this_process_was_started(started, starter, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", [started])
    assert written("train", starter=starter) == expected


def test_bundled_weights_are_named_without_a_path(tmp_path):
    assert named_weights("bundled:preview_dit") == BUNDLED / "preview_dit.safetensors"
    assert named_weights(str(tmp_path / "mine.safetensors")) == tmp_path / "mine.safetensors"
    with pytest.raises(ValueError, match="init_from=bundled:preview_dti is unknown; choose one of: bundled:preview_dit, "):
        named_weights("bundled:preview_dti")


def test_no_recipe_writes_into_the_package_or_reads_a_path_in_it():
    texts = {path: path.read_text() for folder in ("conf", "recipes") for path in (ROOT / folder).rglob("*.yaml")}
    settings = {path: [line for line in text.splitlines() if not line.lstrip().startswith("#")] for path, text in texts.items()}
    assert [path for path, lines in settings.items() if any(("sonic/" in line.partition(" #")[0]) for line in lines)] == []
    exports = [line for lines in settings.values() for line in lines if line.startswith("export:")]
    assert exports and all(line.startswith("export: runs/") for line in exports)
