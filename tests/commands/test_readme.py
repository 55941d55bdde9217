"""README's Python snippets run as they stand."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet.splitlines()[1][:30])
def test_snippet(snippet: str) -> None:
    exec(compile(snippet, "README.md", "exec"), {})


def test_there_are_snippets_and_few_lines() -> None:
    assert len(SNIPPETS) >= 3
    assert len(README.read_text(encoding="utf-8").splitlines()) < 150
