"""The one thing that pyproject.toml cannot say: an installed ghm_d2 carries configs/ inside."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Copies configs/ to where `ghm_d2.config_files` looks for them without a checkout."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "ghm_d2", "configs")
            shutil.rmtree(target, ignore_errors=True)  # of an earlier build
            shutil.copytree("configs", target)


setup(cmdclass={"build_py": BuildWithConfigs})
