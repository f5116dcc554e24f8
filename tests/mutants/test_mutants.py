"""The list of mutants stays applicable while the code moves."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutants.__main__ import ROOT, Mutant, load
from tests.mutants.source import Function, MutantError, find_functions, mutate

MUTANTS = load()


@pytest.fixture(scope="module")
def functions() -> list[Function]:
    return find_functions(ROOT)


def small_tree(root: Path) -> None:
    (root / "hetero_fl").mkdir()
    (root / "model_zoo").mkdir()
    source = "def mean(x):\n    return sum(x) / len(x)\n\n\ndef total(x):\n    return sum(x)\n"
    (root / "hetero_fl" / "sums.py").write_text(source)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.function}:{m.replace}")
def test_mutant_applies_and_names_existing_tests(mutant: Mutant, functions: list[Function]) -> None:
    path, text = mutate(functions, mutant.function, mutant.replace, mutant.by)

    compile(text, str(path), "exec")
    assert all((ROOT / test.split("::")[0]).exists() for test in mutant.tests.split())


def test_mutate_replaces_text_in_one_function_only(tmp_path: Path) -> None:
    small_tree(tmp_path)

    _, text = mutate(find_functions(tmp_path), "sums.total", "sum(x)", "max(x)")

    assert "return sum(x) / len(x)" in text
    assert "return max(x)" in text


@pytest.mark.parametrize(
    ("name", "old", "message"),
    [
        ("median", "sum", "median: expected one function of this name, found none"),
        ("mean", "min(x)", r"mean: expected 'min\(x\)' once, found it 0 times"),
        ("mean", "x", "mean: expected 'x' once, found it 3 times"),
    ],
)
def test_mutate_rejects_missing_text(tmp_path: Path, name: str, old: str, message: str) -> None:
    small_tree(tmp_path)

    with pytest.raises(MutantError, match=message):
        mutate(find_functions(tmp_path), name, old, "y")
