"""How setuptools packages fastenc: a wheel holds kernels/ and bench/, and a source archive holds no tests.

In a checkout fastenc/kernels and fastenc/bench are symbolic links, which setuptools follows. Windows and ZIP archives
turn them into text files; there, the real folders are packaged.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

LINKED = ("kernels", "bench")


class BuildPy(build_py):
    """setuptools' own, which packages the folders beside fastenc/ where the links to them are missing."""

    def finalize_options(self) -> None:
        super().finalize_options()
        for name in LINKED:
            if Path("fastenc", name).is_dir():
                continue
            if not Path(name).is_dir():
                raise SystemExit(f"fastenc: neither fastenc/{name} nor {name} is a folder: this source is not complete")
            self.package_dir = {**(self.package_dir or {}), f"fastenc.{name}": name}
            folders = [Path(name), *sorted(path for path in Path(name).rglob("*") if path.is_dir())]
            modules = (folder for folder in folders if any(folder.glob("*.py")))
            self.packages += [".".join(("fastenc", *folder.parts)) for folder in modules]


class Sdist(sdist):
    """setuptools' own, without tests/, of which it would take the files named test*.py alone."""

    def make_release_tree(self, base_dir: str, files: Iterable[str]) -> Any:
        kept = [name for name in files if name.split(os.sep)[0] != "tests"]
        super().make_release_tree(base_dir, kept)
