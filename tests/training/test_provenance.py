"""Where a run comes from: facts beside its log, with the changes of the code, and without secrets."""

from __future__ import annotations

import json
import subprocess

import pytest
import torch

from sonic.training import provenance as module
from sonic.training.provenance import keep_provenance, provenance
from sonic.training.train_config import BudgetConfig, LogConfig, TrainConfig

CONFIG = TrainConfig(budget=BudgetConfig(max_steps=3), log=LogConfig(tags=["a"], notes="why"))


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A clone with a changed file, a changed binary file, and a file that git does not know."""
    root = tmp_path / "clone"
    root.mkdir()
    git = lambda *words: subprocess.run(["git", "-C", str(root), *words], check=True, capture_output=True)  # noqa: E731
    git("init", "-q")
    (root / "code.py").write_text("one\n\n")
    (root / "data.bin").write_bytes(bytes(range(256)))
    git("add", ".")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "first")
    (root / "code.py").write_text("two\n\n")
    (root / "data.bin").write_bytes(bytes(range(255, -1, -1)))
    (root / "unknown.py").write_text("password = 'hunter2'\n")
    monkeypatch.setattr(module, "data_root", lambda: root)
    return root


def test_the_facts_hold_config_code_machine_and_versions_and_nothing_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_SECRET", "hunter2")
    facts = provenance(CONFIG, command="sonic train", commit="abc")
    assert keep_provenance(facts, tmp_path).files == [tmp_path / "provenance.json"]
    text = (tmp_path / "provenance.json").read_text()
    assert json.loads(text) == facts and "hunter2" not in text
    where = facts["provenance"]
    assert facts["budget"]["max_steps"] == 3 and facts["log"]["notes"] == "why" and where["commit"] == "abc"
    assert where["versions"]["torch"] == torch.__version__ and where["versions"]["python"].startswith("3.")
    assert where["hardware"]["cores"] >= 1 and where["hardware"]["cpu"] and where["hardware"]["memory_gib"] > 0


def test_the_changes_of_the_code_are_kept_as_a_patch_that_git_applies(clone, tmp_path):
    artifact = keep_provenance(provenance(CONFIG, command="", commit="abc+changes"), tmp_path)
    assert [path.name for path in artifact.files] == ["git_diff.patch", "provenance.json"]
    changed = {name: (clone / name).read_bytes() for name in ("code.py", "data.bin")}
    subprocess.run(["git", "-C", str(clone), "checkout", "-q", "."], check=True)
    subprocess.run(["git", "-C", str(clone), "apply", str(tmp_path / "git_diff.patch")], check=True)
    assert changed == {name: (clone / name).read_bytes() for name in changed}


def test_of_files_that_git_does_not_know_only_names_are_kept(clone, tmp_path):
    keep_provenance(provenance(CONFIG, command="", commit="abc+changes"), tmp_path)
    assert json.loads((tmp_path / "provenance.json").read_text())["provenance"]["untracked"] == ["unknown.py"]
    assert not any(b"hunter2" in path.read_bytes() for path in tmp_path.glob("*.*"))


def test_changes_that_are_too_large_are_left_out_with_a_warning(clone, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module, "MOST_DIFF", 10)
    assert len(keep_provenance(provenance(CONFIG, command="", commit="abc+changes"), tmp_path).files) == 1
    assert not (tmp_path / "git_diff.patch").exists() and "are not kept" in caplog.text


def test_each_start_of_a_run_keeps_its_own(tmp_path):
    for command in ("first", "second"):
        keep_provenance(provenance(CONFIG, command=command, commit="abc"), tmp_path)
    found = [json.loads((tmp_path / name).read_text())["provenance"]["command"] for name in ("provenance.json", "provenance-2.json")]
    assert found == ["first", "second"]
