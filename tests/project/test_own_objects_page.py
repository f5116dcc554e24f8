"""Each sentence of the page on a user's own objects names the tests that show it."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reference" / "own_objects.md"


@cache
def functions_of(name: str) -> set[str]:
    trees = [ast.parse(path.read_text("utf-8")) for path in (ROOT / "tests").rglob(name)]
    return {
        node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
    }


def test_each_sentence_names_existing_tests() -> None:
    sections = PAGE.read_text(encoding="utf-8").split("\n## ")[1:]
    items = [item for section in sections for item in section.split("\n- ")[1:]]
    tests = {item: re.findall(r"(test_\w+\.py)::(test_\w+)", item) for item in items}

    assert len(items) >= 25
    assert [item for item, named in tests.items() if not named] == []
    assert [
        (name, function)
        for named in tests.values()
        for name, function in named
        if function not in functions_of(name)
    ] == []
