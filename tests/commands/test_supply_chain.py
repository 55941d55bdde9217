"""What is installed, loaded and written: hashes for every package, no pickles, files only where they were asked for."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import requires
from pathlib import Path

import pytest
import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LISTS = ("requirements.txt", "triton-3.6.txt", "torch-cpu.txt", "nnunet.txt")
# Tests that load a whole network, which they have saved themselves, as people do: weights_only=True reads none.
WHOLE_NETWORKS = {
    "tests/encoder/test_interoperability.py": 1,
    "tests/fusion/test_instances.py": 1,
    "tests/fusion/test_search.py": 1,
}

# ------------------------------------------------------------------------------------------------ what is installed


def entries(name: str) -> list[str]:
    """The requirements in a list of .ci/, each with its continuation lines, without comments."""
    text = re.sub(r"^#.*\n", "", (ROOT / ".ci" / name).read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def pins(name: str) -> dict[str, str]:
    """Version by package."""
    found = (re.match(r"([\w.-]+)==([^\s;]+)", line) for line in entries(name))
    return {canonicalize_name(match[1]): match[2] for match in found if match}


@pytest.mark.parametrize("name", LISTS)
def test_every_package_has_a_version_and_a_hash(name: str) -> None:
    lines = entries(name)
    assert len(pins(name)) == len(lines) > 0
    for line in lines:
        assert re.fullmatch(r"[\w.-]+==[\w.+]+( ; [^-]+?)?(\s+--hash=sha256:[0-9a-f]{64})+\s*", line), line[:80]


def test_the_lists_are_of_the_pinned_versions() -> None:
    """make lock was run after the last change of .ci/constraints.txt."""
    assert pins("requirements.txt") == pins("constraints.txt")
    assert pins("torch-cpu.txt") == {"torch": pins("constraints.txt")["torch"] + "+cpu"}


def dependencies(name: str) -> list[str]:
    """What a package asks for; fastenc as pyproject.toml has it now."""
    if name != "fastenc":
        return requires(name) or []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].items()
    return project["dependencies"] + [f'{text}; extra == "{extra}"' for extra, texts in extras for text in texts]


def needed(name: str, extras: frozenset[str], seen: set[tuple[str, frozenset[str]]]) -> Iterator[str]:
    """The package and what it asks for here, directly and not."""
    if (name, extras) in seen:
        return
    seen.add((name, extras))
    yield name
    for requirement in map(Requirement, dependencies(name)):
        asked = canonicalize_name(requirement.name)
        marker = requirement.marker
        wanted = marker is None or any(marker.evaluate({"extra": extra}) for extra in extras or ("",))
        # A torch for GPUs pins its CUDA libraries itself.
        if wanted and not (name == "torch" and asked.startswith(("cuda-", "nvidia-"))):
            yield from needed(asked, frozenset(requirement.extras), seen)


def test_the_list_is_complete() -> None:
    """Nothing that the tests, the demo and the benchmarks need would be fetched unchecked, outside the list."""
    found = set(needed("fastenc", frozenset({"dev"}), set()))
    assert {"torch", "monai", "mypy", "pytest", "rich", "sympy"} <= found
    assert found - {"fastenc"} - pins("requirements.txt").keys() == set()


def test_make_installs_from_the_lists_alone() -> None:
    recipes = re.findall(r"^\t(.*(?:pip|\$\(INSTALL\)|\$\(HASHED\)).*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    lists = [recipe for recipe in recipes if "-r .ci/" in recipe]
    assert all(recipe.startswith("$(HASHED) ") for recipe in lists)
    assert {name for recipe in lists for name in re.findall(r"-r \.ci/(\S+)", recipe)} == set(LISTS)
    (other,) = set(recipes) - set(lists)
    assert other.endswith("--editable '.[dev]'")
    assert "HASHED := $(INSTALL) --require-hashes --only-binary :all:" in (ROOT / "Makefile").read_text()


# --------------------------------------------------------------------------------------------------- what is loaded


def unsafe_loads(source: str) -> list[int]:
    """The lines where torch.load, by whatever name it was imported, is used other than to load weights only."""
    tree = ast.parse(source)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    safe = {
        call.func
        for call in calls
        if any(
            keyword.arg == "weights_only" and isinstance(keyword.value, ast.Constant) and keyword.value.value is True
            for keyword in call.keywords
        )
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in ("torch", "torch.serialization"):
            found += [node.lineno for alias in node.names if alias.name == "load"]
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.serialization.load"):
            found += [node.lineno] if node not in safe else []
    return found


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("torch.load(f)", [1]),
        ("torch.load(f, weights_only=False)", [1]),
        ("\ntorch.load(f, weights_only=flag)", [2]),
        ("torch.serialization.load(f)", [1]),
        ("read = torch.load", [1]),
        ("from torch import load", [1]),
        ("torch.load(f, weights_only=True)", []),
        ("json.load(f); torch.jit.load(f); safetensors.torch.load(b)", []),
    ],
)
def test_unsafe_loads_are_seen(source: str, lines: list[int]) -> None:
    assert unsafe_loads(source) == lines


def test_only_weights_are_loaded() -> None:
    """A checkpoint is a third-party file, and a pickle runs code."""
    sources = {
        str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
        for room in ("fastenc", "kernels", "bench", "tests")
        for path in sorted((ROOT / room).rglob("*.py"))
    }
    for path in ROOT.glob("*.md"):
        snippets = re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        sources |= {f"{path.name}, snippet {i}": snippet for i, snippet in enumerate(snippets)}
    assert len(sources) > 100
    found = {name: len(lines) for name, source in sources.items() if (lines := unsafe_loads(source))}
    assert found == WHOLE_NETWORKS


# -------------------------------------------------------------------------------------------------- what is written

COMMANDS = """
import contextlib, sys
sys.modules.update(dict.fromkeys(("rich", "matplotlib", "pytest")))
import fastenc
from fastenc.__main__ import main
assert not {"fastenc.commands.doctor", "fastenc.commands.demo", "fastenc.bench"} & set(sys.modules)
from fastenc.bench.__main__ import SUBCOMMANDS

commands = "demo", "accelerate", "nnunet", "doctor", "bench"
for command in (*([name] for name in commands), *(["bench", name] for name in SUBCOMMANDS)):
    with contextlib.suppress(SystemExit):
        main([*command, "--help"])
assert main(["demo"]) == 2  # without rich
assert main(["doctor"]) == main(["doctor", "--json"]) == 0
main(["accelerate", "--out", "told/table.md"])
"""


def test_the_command_line_writes_only_where_it_is_told(tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "here")}
    for folder in (*folders.values(), told := folders["here"] / "told"):
        folder.mkdir()
    environment = {**os.environ, **{k: str(v) for k, v in folders.items()}, "PATH": "", "PYTHONPATH": str(ROOT)}
    environment |= {"FASTENC_BACKEND": "auto", "CUDA_VISIBLE_DEVICES": ""}  # on a GPU, triton has a cache
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS],
        cwd=folders["here"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert written == [told / "table.md"]
