"""The size of the project stays within `budgets.toml`, whose figures may only fall."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from hetero_fl.algorithms import Algorithm
from tests.support.round_tracer import trace_round

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[2]
BUDGETS: dict[str, Any] = tomllib.loads((ROOT / "budgets.toml").read_text(encoding="utf-8"))
# Modules of tests that may import internals: shared code, and tools that run other versions.
WHITE_BOX_FOLDERS = ("support", "references", "mutants", "frozen_bits")
PUBLIC = ("hetero_fl", "hetero_fl.cli", "model_zoo")


def python_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def count_statements(path: Path) -> int:
    """Count the statements of a module without docstrings."""
    return sum(
        isinstance(node, ast.stmt) and not _is_text(node)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    )


def _is_text(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def test_statements_are_within_the_budget() -> None:
    found: Counter[str] = Counter()
    for folder in ("hetero_fl", "model_zoo", "tests", "benchmarks", "scripts"):
        for path in python_files(folder):
            *packages, _ = path.relative_to(ROOT).parts
            package = ".".join(packages[:2]) if folder == "hetero_fl" else folder
            found[package] += count_statements(path)

    budget = BUDGETS["statements"]

    assert {name: n for name, n in found.items() if n > budget.get(name, 0)} == {}


@pytest.mark.parametrize("method", BUDGETS["round"])
def test_round_is_within_the_budget(method: str, tmp_path: Path) -> None:
    budget = BUDGETS["round"][method]

    tracer = trace_round(method, tmp_path / "run")

    assert (len(tracer.modules), tracer.depth) <= (budget["modules"], budget["frames"])
    assert tracer.depth <= budget["frames"]


def test_base_class_of_methods_is_within_the_budget() -> None:
    names = {*dir(Algorithm), *Algorithm.model_fields} - {*dir(BaseModel)}

    assert sum(not name.startswith("_") for name in names) <= BUDGETS["base_class"]["names"]


def test_documentation_is_within_the_budget() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]

    words = sum(len(page.read_text(encoding="utf-8").split()) for page in pages)

    assert words <= BUDGETS["documentation"]["words"]


@pytest.mark.slow
def test_items_are_within_the_budget() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-qq", "-m", ""]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    items = sum(int(line.rpartition(": ")[2]) for line in output.splitlines() if ": " in line)

    assert 0 < items <= BUDGETS["tests"]["items"]


def test_tests_use_the_public_interface_or_support() -> None:
    allowed = set(BUDGETS["tests"]["white_box"])
    found = {
        str(path.relative_to(ROOT))
        for path in python_files("tests")
        if path.parent.name not in WHITE_BOX_FOLDERS and _imports_internals(path)
    }

    assert found - allowed == set(), "use the public interface, or tests/support"
    assert allowed - found == set(), "remove these modules from budgets.toml"


def _imports_internals(path: Path) -> bool:
    """Return whether a module imports anything of the packages but the public interface."""
    return any(
        isinstance(node, ast.ImportFrom)
        and str(node.module).partition(".")[0] in PUBLIC
        and node.module not in PUBLIC
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    )
