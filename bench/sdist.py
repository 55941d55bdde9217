"""The source archive: what a wheel is built from, and no tests, which need the whole checkout."""

import os
from collections.abc import Iterable
from typing import Any

from setuptools.command.sdist import sdist


class Sdist(sdist):
    """setuptools' own, without tests/, of which it would take the files named test*.py alone."""

    def make_release_tree(self, base_dir: str, files: Iterable[str]) -> Any:
        kept = [name for name in files if name.split(os.sep)[0] != "tests"]
        super().make_release_tree(base_dir, kept)
