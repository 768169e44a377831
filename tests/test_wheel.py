"""The installed package: contents of the wheel, a video made by an installed wheel, and an installed clone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import skimage
from infer_command import FACE, ROOT, babble, write_wav
from video_files import read_frames

import sonic
from sonic.main import COMMANDS
from sonic.system.program import LAUNCHERS

BUILT_FROM = ("sonic", "conf", "recipes", "launch", "setup.py", "setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
BUILD = "import sys; from setuptools import build_meta; build_meta.build_editable(sys.argv[1])"
OUTSIDE = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def run(*command: str | Path, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*map(str, command)], cwd=cwd, env=OUTSIDE, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """The files that the package is built from, in a folder of the package's own name."""
    folder = tmp_path_factory.mktemp("beside") / "sonic"
    folder.mkdir()
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(clone, tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("wheel")
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet")
    run(sys.executable, "-m", "pip", "wheel", *offline, "--wheel-dir", made, clone, cwd=made)
    return next(made.glob("sonic-*.whl"))


def installed(wheel: Path, folder: Path) -> Path:
    """The programs of a new environment with only this wheel, where everything else comes from this environment."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=wheel.parent)
    python = folder / "bin/python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet", wheel, cwd=wheel.parent)
    own = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).stdout.strip())
    packages = [position for position in sys.path if Path(position).name in ("site-packages", "dist-packages")]
    (own / "of_the_tests.pth").write_text("\n".join(packages) + "\n")  # whose own .pth files are not read
    return folder / "bin"


@pytest.fixture(scope="module")
def programs(wheel, tmp_path_factory) -> Path:
    return installed(wheel, tmp_path_factory.mktemp("installed") / "venv")


def test_the_wheel_carries_the_library_its_configs_its_recipes_and_its_assets(clone, wheel):
    there = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    library = {path.relative_to(clone) for path in (clone / "sonic").rglob("*.py")}
    assets = {path.relative_to(clone) for path in (clone / "sonic/assets").iterdir()}
    configs = {Path("sonic") / path.relative_to(clone) for position in ("conf", "recipes") for path in (clone / position).rglob("*.yaml")}
    assert there == {path.as_posix() for path in library | assets | configs}
    assert {"sonic/conf/preset/standard/preview.yaml", "sonic/recipes/distill/preview_2step.yaml"} <= there


def test_an_installed_wheel_makes_a_video_in_an_empty_folder(programs, tmp_path):
    where = run(programs / "python", "-c", "import sonic; print(sonic.__file__)", cwd=tmp_path).stdout.strip()
    assert Path(where).is_relative_to(programs.parent)
    shutil.copy(Path(skimage.__file__).parent / "data/astronaut.png", tmp_path / "me.png")
    write_wav(tmp_path / "me.wav", babble(0.9))
    given = ("image=me.png", "audio=me.wav", "output=o.mp4", "device=cpu", "run.threads=1", "name=first", *FACE)
    run(programs / "sonic", "infer", "+preset=fast_preview", *given, cwd=tmp_path)
    assert len(list(read_frames(tmp_path / "o.mp4"))) >= 22
    assert (tmp_path / "runs/first/command.txt").read_text().startswith("sonic infer +preset=fast_preview image=me.png")
    assert (tmp_path / "runs/first/git_commit.txt").read_text() == f"version {sonic.__version__}\n"  # whatever repository is around it
    assert {path.name for path in tmp_path.iterdir()} == {"me.png", "me.wav", "o.mp4", "runs"}


def test_an_installed_wheel_has_every_recipe_and_starts_its_cells_from_itself(programs, tmp_path):
    (tmp_path / "sonic").mkdir()
    (tmp_path / "sonic/__init__.py").write_text("raise RuntimeError('another package of that name')\n")
    words = "from sonic.system.program import command_words; import subprocess, sys"
    script = f"{words}; sys.exit(subprocess.call([*command_words('evaluate'), '--cfg']))"
    assert "clips: 20" in run(programs / "python", "-P", "-c", script, cwd=tmp_path).stdout
    found = run(programs / "sonic", "train", "+distill=preview_2step", "--cfg", cwd=tmp_path).stdout
    assert "export: runs/preview_2step/preview_2step.safetensors" in found
    assert "init_from: bundled:preview_dit" in run(programs / "sonic", "train", "+train=preview_videos", "--cfg", cwd=tmp_path).stdout


@pytest.mark.parametrize("program", [("sonic",), ("python", "-m", "sonic")])
def test_the_program_lists_its_commands_with_a_line_each_and_says_how_it_was_started(program, programs, tmp_path):
    message = run(programs / program[0], *program[1:], "--help", cwd=tmp_path).stdout
    for name, line in COMMANDS.items():
        assert f"  {name:<12} {line}\n" in message
    assert f"usage: {' '.join(program)} COMMAND" in message
    assert f"usage: {' '.join(program)} plan" in run(programs / program[0], *program[1:], "plan", "-h", cwd=tmp_path).stdout
    unknown = run(programs / program[0], *program[1:], "infr", cwd=tmp_path, code=2).stderr
    assert unknown.startswith("sonic: error: command=infr is unknown; choose one of: infer, ") and unknown.count("\n") == 1
    needed = run(programs / program[0], *program[1:], "infer", "model=wan_s2v_14b", cwd=tmp_path, code=2).stderr
    assert f"made by {' '.join(program)} convert of the published" in needed


def test_an_installed_clone_is_found_from_a_script_beside_it_and_by_its_launch_files(clone, tmp_path):
    run(sys.executable, "-c", BUILD, tmp_path, cwd=clone)  # what pip install -e does
    programs = installed(next(tmp_path.glob("*.whl")), tmp_path / "venv")
    (clone.parent / "mine.py").write_text("import sonic\nprint(sonic.__file__)\n")
    assert run(programs / "python", "mine.py", cwd=clone.parent).stdout.strip() == str(clone / "sonic/__init__.py")
    message = run(programs / "python", "launch/plan.py", "--help", cwd=clone).stdout
    assert "usage: python launch/plan.py [" in message and "example: python launch/plan.py model=" in message
    assert "preset=fast_preview|" in run(programs / "sonic", "infer", "--help", cwd=tmp_path).stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_a_launch_file_says_in_a_sentence_that_the_library_is_not_installed(name, clone):
    done = run(sys.executable, "-S", f"launch/{LAUNCHERS.get(name, name)}.py", "--help", cwd=clone, code=2)
    assert done.stderr == "sonic is not installed; run pip install -e . or ./launch/quickstart.sh\n"
