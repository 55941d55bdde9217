"""The entries of mutants.toml still apply to the product. `make mutants` checks that each is caught."""

from collections import Counter

import pytest
from tools.mutants import ROOT, Mutant, main, mutants, outcome


@pytest.mark.parametrize("mutant", mutants(), ids=lambda mutant: mutant.what)
def test_every_mutant_can_be_made(mutant: Mutant) -> None:
    source = (ROOT / mutant.file).read_text()
    broken = mutant.made_of(source)
    compile(broken, mutant.file, "exec")
    lines, broken_lines = source.splitlines(), broken.splitlines()
    assert len(lines) == len(broken_lines)
    assert sum(map(str.__ne__, lines, broken_lines)) == 1
    assert all((ROOT / test).is_file() for test in mutant.tests)


def test_the_rooms_that_can_give_wrong_numbers_are_broken() -> None:
    count = Counter(mutant.file for mutant in mutants())
    kernels = sum(count[f"kernels/{path.name}"] for path in (ROOT / "kernels").glob("*.py"))
    assert kernels >= 20
    assert count["fastenc/route.py"] >= 5
    assert count["fastenc/convolution.py"] >= 5
    assert count.total() >= 30


def test_a_line_that_is_gone_is_named() -> None:
    gone = Mutant("eps left out", "kernels/formula.py", "no such line", "", ("tests/proofs/test_plan.py",))
    with pytest.raises(ValueError, match=r"kernels/formula.py must hold 'no such line' once, found 0 times"):
        gone.made_of("")


def test_a_mutant_that_no_test_covers_survives(tmp_path, capsys) -> None:
    (tmp_path / "test_nothing.py").write_text("def test_nothing():\n    pass\n")
    assert outcome(tmp_path, ["test_nothing.py"])[0] == 0
    (tmp_path / "test_nothing.py").write_text("def test_nothing():\n    assert False\n")
    assert outcome(tmp_path, ["test_nothing.py"])[0] == 1
    with pytest.raises(SystemExit):
        main(["--only", "no such break"])
    assert "no such break" in capsys.readouterr().err
