"""What is installed is what is here: a wheel holds every room, and works without the checkout and without triton."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = ("fastenc", "kernels", "bench")


def modules(folder: Path) -> set[str]:
    """The Python files below a folder."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")}


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
        found, expected = modules(inside), modules(ROOT / room)
        assert {name for name in found if name.split("/")[0] not in ROOMS} == expected
    assert (site / "fastenc" / "py.typed").exists()
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r}); sys.modules['triton'] = None; import torch, fastenc; "
        f"assert fastenc.__file__.startswith({str(site)!r}); "
        "print(tuple(fastenc.EncoderNet3d(2, [1, 1])(torch.randn(2, 1, 8, 8, 8)).shape))"
    )
    printed = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=tmp_path)
    assert printed.strip() == "(2, 2)"


def test_a_checkout_without_links_imports_and_builds_a_whole_archive_and_wheel(tmp_path: Path) -> None:
    """As Windows checks it out: the links are files that hold their targets' names."""
    source = tmp_path / "source"
    for room in (*ROOMS, "tests"):
        ignored = shutil.ignore_patterns("__pycache__", *(ROOMS[1:] if room == "fastenc" else ()))
        shutil.copytree(ROOT / room, source / room, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for room in ROOMS[1:]:
        (source / "fastenc" / room).write_text(f"../{room}")
    imports = "from fastenc.kernels import plan; from fastenc.bench.engine import record; "
    code = f"{imports}print(plan.__file__, record.__file__)"
    printed = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=source)
    assert printed.split() == [str(source / "kernels" / "plan.py"), str(source / "bench" / "engine" / "record.py")]
    build = f"import setuptools.build_meta as b; b.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], check=True, cwd=source, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        assert not [name for name in opened.getnames() if "/tests" in name]
    for place, what in (("direct", source), ("from archive", archive)):
        pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path / place]
        subprocess.run([*pip, what], check=True)
        (wheel,) = (tmp_path / place).glob("*.whl")
        names = set(zipfile.ZipFile(wheel).namelist())
        for room in ROOMS[1:]:
            assert {f"fastenc/{room}/{path}" for path in modules(ROOT / room)} <= names
    shutil.rmtree(source / "kernels")
    failed = subprocess.run([sys.executable, "-c", code], text=True, cwd=source, capture_output=True, check=False)
    assert "ImportError: fastenc: " in failed.stderr
    assert "has no kernels" in failed.stderr


def test_kernels_stay_a_namespace() -> None:
    """An __init__.py would shadow another package of that name when Python runs in the checkout."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
