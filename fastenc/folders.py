"""The folders of fastenc.kernels and fastenc.bench: links in fastenc/, or the folders next to it."""

import sys
from pathlib import Path

HERE = Path(__file__).parent

if not (HERE / "kernels").is_dir():  # a checkout without symbolic links, as on Windows or from a ZIP, or its archive
    if not (HERE.parent / "kernels" / "launch.py").is_file():
        raise ImportError(f"fastenc: {HERE} has no kernels: this installation is not complete, install fastenc again")
    sys.modules[__package__].__path__.append(str(HERE.parent))
