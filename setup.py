"""Lay out the wheel. Everything else about the package is in setup.cfg.

PEP 561 has no marker for a single-file module, and such a module has no place for files of its own. So the wheel
holds each module as a folder with an `__init__.py` and a `py.typed`. The folder `tinyqueue` also holds worker.py,
wsgi.py and the files that wsgi.py serves. The source tree stays flat, and an editable install uses it as it is:
`__path__` in tinyqueue.py gives the files the same names there.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildFolders(build_py):
    """Build each of py_modules as a folder."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.data_files = [
            (package, ".", str(Path(self.build_lib, package)), files) for package, files in self.package_data.items()
        ]

    def find_modules(self) -> list[tuple[str, str, str]]:
        """List the modules as (package, module, source file)."""
        return [(module, "__init__", f"{module}.py") for module in self.py_modules]

    def run(self) -> None:
        if self.editable_mode:
            return
        # The wheel gets everything that is in there, including what an earlier build has left behind.
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()
        self.build_package_data()
        for module in self.py_modules:
            Path(self.build_lib, module, "py.typed").touch()


setup(cmdclass={"build_py": BuildFolders})
