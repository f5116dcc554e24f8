"""Mutants are drawn, apply to the tree, and are judged by the tests that execute them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutants.__main__ import ROOT, is_lost, load
from tests.mutants.draw import draw_mutants, mutants_of
from tests.mutants.source import Function, Mutant, MutantError, find_functions, mutate

SOURCE = """\
def mean(x):
    if len(x) == 0:
        raise ValueError(x, "no values")
    return sum(x) / len(x)


class Sums:
    def total(self, x):
        return sum(x) + 1
"""


def small_tree(root: Path) -> list[Function]:
    for name in ("hetero_fl", "model_zoo"):
        (root / name).mkdir()
    (root / "hetero_fl" / "sums.py").write_text(SOURCE)
    return find_functions(root)


def test_mutants_of_the_list_apply() -> None:
    functions = find_functions(ROOT)
    for mutant in load():
        change = mutate(functions, mutant)
        compile(change.text, str(change.path), "exec")


def test_mutate_replaces_text_in_one_function_only(tmp_path: Path) -> None:
    change = mutate(small_tree(tmp_path), Mutant("Sums.total", "sum(x)", "max(x)"))

    assert "return sum(x) / len(x)" in change.text
    assert "return max(x) + 1" in change.text
    assert list(change.lines) == [9]


@pytest.mark.parametrize(
    ("name", "old", "message"),
    [
        ("median", "sum", "median: expected one function of this name, found none"),
        ("mean", "min(x)", r"mean: expected 'min\(x\)' once, found it 0 times"),
        ("mean", "len(x)", r"mean: expected 'len\(x\)' once, found it 2 times"),
    ],
)
def test_mutate_rejects_missing_text(tmp_path: Path, name: str, old: str, message: str) -> None:
    with pytest.raises(MutantError, match=message):
        mutate(small_tree(tmp_path), Mutant(name, old, "y"))


def test_each_kind_of_mutant_is_drawn(tmp_path: Path) -> None:
    found = {
        (kind, mutant.replace.strip(), mutant.by.strip())
        for function in small_tree(tmp_path)
        for kind, mutant in mutants_of(function)
    }

    assert found == {
        ("comparison", "if len(x) == 0:", "if (len(x)) != (0):"),
        ("constant", "if len(x) == 0:", "if len(x) == 1:"),
        ("dropped statement", 'raise ValueError(x, "no values")', "pass"),
        (
            "swapped arguments",
            'raise ValueError(x, "no values")',
            "raise ValueError('no values', x)",
        ),
        ("arithmetic", "return sum(x) / len(x)", "return (sum(x)) * (len(x))"),
        ("arithmetic", "return sum(x) + 1", "return (sum(x)) - (1)"),
        ("constant", "return sum(x) + 1", "return sum(x) + 2"),
    }
    assert len(draw_mutants(tmp_path, 5, seed=0)) == 5
    assert draw_mutants(tmp_path, 5, seed=0) == draw_mutants(tmp_path, 5, seed=0)


@pytest.mark.parametrize(
    ("before", "after", "lost"),
    [
        ("quick", "slow", True),
        ("slow", "none", True),
        ("slow", "quick", False),
        ("none", "none", False),
    ],
)
def test_mutant_is_lost_if_its_class_of_tests_does_not_kill_it(
    before: str, after: str, lost: bool
) -> None:
    assert is_lost(before, after) is lost
    assert not is_lost(before, None), "a mutant that does not apply is not lost"
