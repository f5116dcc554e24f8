"""Each way to pass data gives the same classes for the same labels, or says why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.label_columns import WAYS, applies, label_columns, read_one


def test_every_way_gives_the_same_classes_or_says_why_not(
    tmp_path: Path, subtests: pytest.Subtests
) -> None:
    columns = label_columns()
    assert len(columns) >= 60
    compared = 0
    for number, (name, y) in enumerate(columns.items()):
        expected: Any = None
        for way, read in WAYS.items():
            if not applies(way, y):
                continue
            folder = tmp_path / f"{number} {way}"
            folder.mkdir()
            with subtests.test(labels=name, way=way):
                found, notes = read_one(read, folder, y)
                if way == "arrays":
                    expected = found
                    continue
                compared += not isinstance(found, str)
                if isinstance(found, str) or isinstance(expected, str):
                    # Missing and infinite labels are refused in all ways.
                    assert isinstance(found, str) and isinstance(expected, str), (found, expected)
                    assert "\n" not in found
                    assert any(word in found for word in ("y", "label", "object"))
                elif found != expected:
                    assert any(f"={expected[0]}" in n or f"'{expected[0]}'" in n for n in notes)
    assert compared >= 300
