from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hetero_fl.core.task import Task
from hetero_fl.data import Examples, check_examples
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.ordering import natural_order
from hetero_fl.utils.registry import import_reference

CLASSES = Task("multiclass", 3)
IMAGES = torch.zeros(4, 1, 5, 5, dtype=torch.uint8)
LABELS = torch.tensor([0, 1, 2, 0])


def test_valid_examples_are_accepted() -> None:
    check_examples(Examples(IMAGES, LABELS), CLASSES, "here")
    # one class only is allowed
    check_examples(Examples(IMAGES, torch.zeros(4, dtype=torch.int64)), CLASSES, "here")
    check_examples(Examples(torch.zeros(4, 2), torch.ones(4, 3)), Task("multilabel", 3), "here")
    check_examples(Examples(torch.zeros(4, 7, 2), torch.randn(4, 1)), Task("regression", 1), "here")


def with_nan(*shape: int) -> torch.Tensor:
    x = torch.zeros(*shape)
    x[2].view(-1)[0] = float("nan")
    return x


@pytest.mark.parametrize(
    ("x", "y", "task", "words"),
    [
        (IMAGES[:0], LABELS[:0], CLASSES, "here: x: has no rows"),
        (IMAGES[:, 0], LABELS, CLASSES, "got uint8 of shape (4, 5, 5)"),
        (IMAGES.short(), LABELS, CLASSES, "x: expected uint8 images or floats, got int16"),
        (torch.zeros(4), LABELS, CLASSES, "got float32 of shape (4,)"),
        (torch.zeros(4, 0), LABELS, CLASSES, "got float32 of shape (4, 0)"),
        (with_nan(4, 3), LABELS, CLASSES, "x: row 2: NaN or infinite value"),
        (with_nan(4, 1, 5, 5), LABELS, CLASSES, "x: row 2: NaN or infinite value"),
        (IMAGES, None, CLASSES, "y: missing"),
        (
            IMAGES,
            LABELS.float(),
            CLASSES,
            "y: expected int64 class labels of shape (4,), got float32",
        ),
        (IMAGES, LABELS[:, None], CLASSES, "got int64 of shape (4, 1)"),
        (
            IMAGES,
            torch.tensor([0, 1, 3, 0]),
            CLASSES,
            "y: row 2: label 3 is out of range 0 to 2",
        ),
        (IMAGES, torch.tensor([0, -1, 3, 0]), CLASSES, "y: row 1: label -1"),
        (
            IMAGES,
            LABELS,
            Task("multilabel", 2),
            "y: expected multilabel targets as floats of shape (4, 2), got int64",
        ),
        (
            IMAGES,
            torch.full((4, 2), 0.5),
            Task("multilabel", 2),
            "y: row 0: multilabel targets must be 0 or 1",
        ),
        (IMAGES, with_nan(4, 2), Task("regression", 2), "y: row 2: NaN or infinite value"),
        (IMAGES, torch.zeros(4, 2), Task("regression", 1), "got float32 of shape (4, 2)"),
    ],
)
def test_malformed_examples_are_refused(
    x: torch.Tensor, y: torch.Tensor | None, task: Task, words: str
) -> None:
    with pytest.raises(UserError) as refused:
        check_examples(Examples(x, y), task, "here")
    assert words in str(refused.value)


def test_unaligned_columns_are_refused() -> None:
    with pytest.raises(UserError, match="y: expected 4 rows as in x, got 3"):
        Examples(IMAGES, LABELS[:3])
    with pytest.raises(UserError, match="group: expected 4 rows as in x, got 2"):
        Examples(IMAGES, LABELS, LABELS[:2])


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
        with pytest.raises(UserError) as refused:
            import_reference(reference, "data.name")
        assert str(refused.value).startswith("data.name: ") and words in str(refused.value)
