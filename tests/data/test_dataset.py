from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hetero_fl.core.task import Task
from hetero_fl.data import Examples, check_examples
from hetero_fl.utils.ordering import natural_order
from hetero_fl.utils.registry import import_reference
from tests.support.mistakes import refusal

CLASSES = Task("multiclass", 3)
IMAGES = torch.zeros(4, 1, 5, 5, dtype=torch.uint8)
LABELS = torch.tensor([0, 1, 2, 0])


def test_valid_examples_are_accepted() -> None:
    check_examples(Examples(IMAGES, LABELS), CLASSES, "here")
    # one class only is allowed
    check_examples(Examples(IMAGES, torch.zeros(4, dtype=torch.int64)), CLASSES, "here")
    check_examples(Examples(torch.zeros(4, 2), torch.ones(4, 3)), Task("multilabel", 3), "here")
    check_examples(Examples(torch.zeros(4, 7, 2), torch.randn(4, 1)), Task("regression", 1), "here")


def test_take_keeps_columns_together() -> None:
    x = torch.arange(4.0)[:, None]
    taken = Examples(x, LABELS, LABELS + 1, ("a", "b", "c", "d")).select_rows(torch.tensor([3, 1]))
    assert taken.x.flatten().tolist() == [3, 1]
    assert taken.y is not None and taken.y.tolist() == [0, 1]
    assert taken.group is not None and taken.group.tolist() == [1, 2]
    assert Examples(x).select_rows(torch.tensor([0])).y is None


def test_names_are_in_natural_order() -> None:
    assert natural_order({"site_10", "site_2", "a1", "10", "9"}) == [
        "9",
        "10",
        "a1",
        "site_2",
        "site_10",
    ]
    assert natural_order(["a01", "a1"]) == natural_order(["a1", "a01"])
    assert natural_order(["é", "f", "e", "x²", "x3"]) == ["e", "f", "x3", "x²", "é"]


def test_import_reference_imports_or_explains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [])
    (tmp_path / "mine_for_import.py").write_text("def value(): return 7\n")
    (tmp_path / "broken_for_import.py").write_text("1 / 0\n")
    assert import_reference("python:mine_for_import:value", "data.name", takes="")() == 7
    for reference, words in (
        ("python:mine_for_import", "expected python:package.module:Name"),
        ("python:mine_for_import:valu", "did you mean 'value'?"),
        ("python:no_such_module:x", "module 'no_such_module' not found in the working directory"),
        ("python:broken_for_import:x", "ZeroDivisionError"),
    ):
        refused = refusal(import_reference, reference, "data.name")
        assert refused.startswith("data.name: ") and words in refused
