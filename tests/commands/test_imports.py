"""Imports run one way: encoder → layers → functional → (reference | library → kernels); the rest comes last."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PATH = ("encoder", "layers", "functional", "library", "kernels")  # a module imports only those to its right
LIBRARY = sorted(
    path.relative_to(ROOT)
    for folder in ("fastenc", "fastenc/fusion", "kernels")
    for path in (ROOT / folder).glob("*.py")
    if path.name != "__main__.py"
)


def imported(source: str, package: str) -> set[str]:
    """The absolute names of what a module of `package` imports, at any depth of the file."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def imports_of(path: Path) -> set[str]:
    """What a file imports; kernels/ is imported as fastenc.kernels."""
    parent = ".".join(path.parent.parts)
    package = "fastenc.kernels" if parent == "kernels" else parent
    return imported((ROOT / path).read_text(encoding="utf-8"), package)


def below(names: set[str], *modules: str) -> set[str]:
    """Those of the names that are one of the modules or inside it."""
    return {name for name in names for module in modules if f"{name}.".startswith(f"{module}.")}


def test_relative_and_absolute_imports_are_read() -> None:
    source = "def f():\n    from ..bench import x\nfrom . import route\nimport fastenc.commands.demo\nfrom .a import b"
    names = imported(source, "fastenc.fusion")
    assert {"fastenc.bench.x", "fastenc.fusion.route", "fastenc.commands.demo", "fastenc.fusion.a.b"} <= names


@pytest.mark.parametrize("path", LIBRARY, ids=str)
def test_the_library_imports_neither_commands_nor_bench_nor_nnunet(path: Path) -> None:
    assert not below(imports_of(path), "fastenc.commands", "fastenc.bench", "fastenc.nnunet", "nnunetv2")


@pytest.mark.parametrize("path", [path for path in LIBRARY if path.parts[0] == "kernels"], ids=str)
def test_kernels_import_nothing_else_of_fastenc(path: Path) -> None:
    names = imports_of(path)
    assert below(names, "fastenc") == below(names, "fastenc.kernels")


@pytest.mark.parametrize("position", range(len(PATH) - 1))
def test_the_path_of_a_call_runs_one_way(position: int) -> None:
    names = imports_of(Path("fastenc") / f"{PATH[position]}.py")
    assert not below(names, *(f"fastenc.{name}" for name in PATH[:position]))
    assert not below(imports_of(Path("fastenc/reference.py")), *(f"fastenc.{name}" for name in PATH))


def test_no_imports_run_in_a_circle() -> None:
    """Those of fastenc, its kernels and bench; imports inside functions count too."""
    modules = {}
    for path in (path for folder in ("fastenc", "bench", "kernels") for path in (ROOT / folder).rglob("*.py")):
        if path.name not in ("__init__.py", "__main__.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            modules[f"fastenc.{name.removeprefix('fastenc.')}"] = path
    assert {"fastenc.bench.baselines.op", "fastenc.route", "fastenc.kernels.plan"} <= set(modules)
    graph = {
        name: (imported(path.read_text(encoding="utf-8"), name.rpartition(".")[0]) & set(modules)) - {name}
        for name, path in modules.items()
    }
    list(TopologicalSorter(graph).static_order())
