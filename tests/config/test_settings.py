"""Class variables of settings."""

from __future__ import annotations

import re
from pathlib import Path


def test_class_variables_state_their_type() -> None:
    # Under Python 3.10, pydantic cannot evaluate `ClassVar` without a type.
    root = Path(__file__).parents[2]
    bare = [
        path.name
        for package in ("hetero_fl", "model_zoo")
        for path in (root / package).rglob("*.py")
        if re.search(r": ClassVar\b(?!\[)", path.read_text(encoding="utf-8"))
    ]

    assert not bare
