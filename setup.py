"""Builds the package: setup.cfg says what is in it, and conf/ and recipes/, which stand beside it here, go into it in a wheel."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """As setuptools builds, and every YAML of conf/ and recipes/ below sonic/, where sonic.system.program.data_root looks first."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # the checkout itself is used, and its conf/ with it
            return
        for folder in ("conf", "recipes"):
            shutil.rmtree(Path(self.build_lib, "sonic", folder), ignore_errors=True)  # of an earlier build, maybe with other files
            for file in sorted(Path(folder).rglob("*.yaml")):
                made = Path(self.build_lib, "sonic", file)
                made.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, made)


setup(cmdclass={"build_py": BuildWithConfigs})
