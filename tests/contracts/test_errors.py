"""Mistakes of users give one line, with the key, the value found and a correction."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.mistakes import check_table

TABLES = sorted((Path(__file__).parents[1] / "errors").glob("*.yaml"))


@pytest.mark.parametrize("table", TABLES, ids=lambda path: path.stem)
def test_mistakes_give_one_line(table: Path, subtests: pytest.Subtests) -> None:
    check_table(subtests, table)
