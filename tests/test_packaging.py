"""What is installed is what is here: a wheel holds every room, and works without the checkout and without triton."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROOMS = ("fastenc", "kernels", "bench")


def test_wheel_holds_every_module_and_works(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in (*ROOMS, "pyproject.toml", "README.md", "LICENSE"):
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source / name)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    for room in ROOMS:
        inside = site / "fastenc" / room if room != "fastenc" else site / "fastenc"
        expected = {path.name for path in (ROOT / room).glob("*.py")}
        assert {path.name for path in inside.glob("*.py")} == expected
    assert (site / "fastenc" / "py.typed").exists()
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r}); sys.modules['triton'] = None; import torch, fastenc; "
        f"assert fastenc.__file__.startswith({str(site)!r}); "
        "print(tuple(fastenc.EncoderNet3d(2, [1, 1])(torch.randn(2, 1, 8, 8, 8)).shape))"
    )
    printed = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=tmp_path)
    assert printed.strip() == "(2, 2)"


def test_kernels_stay_a_namespace() -> None:
    """An __init__.py would shadow other people's package of that name for whoever runs Python in the checkout."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
