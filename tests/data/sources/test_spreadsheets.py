"""Tables exported from spreadsheets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hetero_fl.config.data import SourceConfig
from hetero_fl.data import Dataset, load_source
from hetero_fl.data.external import load_unlabeled
from hetero_fl.utils.errors import UserError
from tests.support.cases import each_case


def load(path: Path, text: str, label: str = "ill", task: str | None = None) -> Dataset:
    path.write_text(text, encoding="utf-8")
    return load_source(
        SourceConfig(name="table", path=str(path), label=label, task=task), path.parent
    )


def test_semicolons_and_decimal_commas(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    found = load(path, "\ufeffcrp;dose;age;note;ill\n0,5;1,250;30;a;no\n-12,25;3,500;41;b;yes\n")
    assert found.train.x.tolist() == [[0.5, 1.25, 30, 1, 0], [-12.25, 3.5, 41, 0, 1]]
    assert found.notes == (
        "table t.csv: label ill; columns used: crp, dose, age, note; "
        "encoded as indicators: note (a, b); left out: none; "
        "decimal commas in crp, dose",
    )
    assert load(path, 'crp,ill\n"0,5",1\n7,0\n').train.x.tolist() == [[0.5], [7]]
    assert load(path, "age;dose, mg;ill\n3;4;0\n5;6;1\n").columns == ("age", "dose, mg")
    assert load(path, "dose (mg; day),age,ill\n3,4,0\n5,6,1\n").columns == ("dose (mg; day)", "age")
    path.write_text("crp;note\n0,5;a\n1,5;b\n", encoding="utf-8")
    found = load_unlabeled(
        SourceConfig(name="table", path=str(path)), tmp_path, "data.proxy.source"
    )
    assert found.train.x.tolist() == [[0.5], [1.5]] and found.columns == ("crp",)


@each_case(
    ("text", "words"),
    (
        (
            "crp;ill\n1,250;0\n3,500;1\n",
            (
                "column 'crp': ambiguous number '1,250' (decimal comma "
                "or thousands); write numbers as 1234.5"
            ),
        ),
        (
            "crp;dose;ill\n0,5;1.250;0\n3,5;2.500;1\n",
            "column 'dose': points may separate thousands, as column 'crp' has decimal commas",
        ),
        (
            "crp;ill\n1.234,5;0\n3.000,5;1\n",
            "row 1, column 'crp': expected a number, got '1.234,5'; write numbers as 1234.5",
        ),
        (
            "crp;ill\n0,5;0\n1.5;1\n",
            "column 'crp': expected a number, got '0,5'; write numbers as 1234.5",
        ),
        (
            "a;b,c;ill\n1;2\n3,4;5;6;7\n",
            "ambiguous separator, as the header has commas and semicolons",
        ),
        (
            "crp,ill\n,0\n2,1\n,1\n",
            "row 1, column 'crp': missing value (2 in 3 rows); fill or remove missing values",
        ),
        ("crp,ill\n1, \n2,1\n", "row 1, column 'ill': missing value (1 in 2 rows)"),
    ),
)
def test_ambiguous_cells_raise_one_line(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        load(tmp_path / "t.csv", text)
    assert str(refused.value).startswith(f"data.path: {tmp_path / 't.csv'}: ") and words in str(
        refused.value
    )


def test_task_follows_the_configuration(tmp_path: Path) -> None:
    path, text = tmp_path / "t.csv", "x,a,b\n1,0,1\n2,1,1\n"
    for label, task, kind, outputs in (
        ("a", None, "multiclass", 2),
        ("a", "regression", "regression", 1),
        ("a", "multilabel", "multilabel", 1),
        ("a,b", "regression", "regression", 2),
    ):
        found = load(path, text, label, task).task
        assert (found.kind, found.outputs) == (kind, outputs)
    many = "x,a\n" + "".join(f"{i},{i}\n" for i in range(30))
    assert load(path, many, "a").task.kind == "regression"
    assert load(path, many, "a", "multiclass").task.outputs == 30
    assert load(path, 'x,a\n1,"1,5"\n2,"2,5"\n', "a", "multiclass").task.names == ("1,5", "2,5")
    for label, task, words in (
        (
            "a,b",
            "multiclass",
            "label a, b: a multiclass task needs one column of labels or one-hot rows, got 2",
        ),
        ("x", "multilabel", "row 1: multilabel targets must be 0 or 1"),
    ):
        with pytest.raises(UserError, match=words):
            load(path, text, label, task)
    np.savez(
        tmp_path / "t.npz", train_images=np.zeros((4, 8, 8), np.uint8), train_labels=[0, 1, 2, 3]
    )
    npz = SourceConfig(name="npz", path=str(tmp_path / "t.npz"), task="regression")
    assert load_source(npz, tmp_path).task.kind == "regression"


def test_images_of_several_sizes_are_scaled(tmp_path: Path) -> None:
    for name, size in (("a", (6, 5)), ("b", (9, 9))):
        (tmp_path / name).mkdir()
        Image.new("L", size).save(tmp_path / name / "0.png")
    source = SourceConfig(name="image_folder", path=str(tmp_path))
    with pytest.raises(
        UserError, match=r"expected 6x5 pixels as in 0\.png, got 9x9; set data\.size"
    ):
        load_source(source, tmp_path)
    assert load_source(source.model_copy(update={"size": 8}), tmp_path).train.x.shape == (
        2,
        1,
        8,
        8,
    )
