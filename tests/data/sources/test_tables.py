"""Tables: columns, and files that are exported from spreadsheets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from hetero_fl.config.data import SourceConfig
from hetero_fl.data import Dataset, load_source
from tests.support.cases import each_case
from tests.support.mistakes import check_refused, refusal

FRAME = pd.DataFrame(
    {
        "age": [30, 41, 52, 63],
        "note": ["a", "b", "c", "d"],
        "dose": [0.5, 1.5, 2.5, 3.5],
        "smoker": [True, False, True, False],
        "site": ["ward_10", "ward_2", "ward_2", "ward_10"],
        "result": ["ill", "well", "ill", "well"],
        "score": [1.25, 2.5, 3.75, 5.0],
    }
)


def load(
    path: Path, label: str | None = "result", group: str | None = None, **settings: Any
) -> Dataset:
    return load_source(
        SourceConfig(name="table", path=str(path), label=label, group=group, **settings),
        path.parent,
    )


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    FRAME.to_csv(tmp_path / "t.csv", index=False)
    return tmp_path / "t.csv"


@each_case(
    ("column", "values", "label", "words"),
    (
        (
            "dose",
            [0.5, "much", 2.5, 3.5],
            "result",
            "row 2, column 'dose': expected a number, got 'much'",
        ),
        ("dose", [0.5, 1.5, None, 3.5], "result", "row 3, column 'dose': missing value"),
        (
            "dose",
            [0.5, 1.5, 2.0, np.inf],
            "result",
            "row 4, column 'dose': expected a finite number, got inf",
        ),
        (
            "dose",
            [0.5, 1e300, 2.0, 1],
            "result",
            "row 2, column 'dose': expected a finite number, got 1e+300",
        ),
        ("dose", [None] * 4, "result", "row 1, column 'dose': missing value"),
        ("result", ["ill", None, "ill", "well"], "result", "row 2, column 'result': missing value"),
        ("site", ["a", None, "b", "c"], "result", "row 2, column 'site': missing value"),
        (
            "dose",
            ["a", "b", "c", "d"],
            "age,dose",
            "column 'dose': expected numbers as multiple labels, got text",
        ),
    ),
)
def test_invalid_cells_are_named(
    column: str, values: Any, label: str, words: str, tmp_path: Path
) -> None:
    FRAME.assign(**{column: values}).to_csv(tmp_path / "t.csv", index=False)
    refused = refusal(load, tmp_path / "t.csv", label, "site")
    assert refused.startswith(f"data.path: {tmp_path / 't.csv'}: ") and words in refused


def test_invalid_columns_are_named(csv: Path) -> None:
    for label, group, words in (
        ("result,result", None, "data.label: column 'result' occurs 2 times"),
        ("reslt", None, "data.label: column 'reslt' not found in .*; did you mean 'result'"),
        ("result", "sit", "data.group: column 'sit' not found in .*; did you mean 'site'"),
        ("result", "result", "data.group: must differ from label, got 'result'"),
        (
            None,
            None,
            "data.label: missing; name the column of the labels; choose from age, dose",
        ),
    ):
        check_refused(words, load, csv, label, group)


def test_invalid_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "head.csv").write_text("x,result\n")
    (tmp_path / "text.csv").write_text("x,result\n" + "".join(f"a{i},b\n" for i in range(20)))
    (tmp_path / "ragged.csv").write_text("x,result\n1,b\n1,2,3,4\n")
    # pandas would take the first cells as names of rows
    (tmp_path / "longer.csv").write_text("x,result\n1,b,\n2,c,\n")
    (tmp_path / "twice.csv").write_text("x,x,result\n1,2,b\n2,3,c\n")
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "latin.csv").write_bytes(b"x,result\n1,\xff\xfe\n")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "t.xlsx").write_bytes(b"")
    for name, words in (
        ("empty.csv", "the file is empty"),
        ("head.csv", "has no rows"),
        ("text.csv", "has no numeric or categorical columns"),
        (
            "ragged.csv",
            "row 2: expected 2 cells as in the header, got 4, '3' after the last column 'result'",
        ),
        (
            "longer.csv",
            "row 1: expected 2 cells as in the header, got 3, '' after the last column 'result'",
        ),
        ("twice.csv", "header: column 'x' occurs 2 times"),
        ("folder.csv", "expected a file, got the folder"),
        ("latin.csv", "not encoded in UTF-8"),
        ("bad.parquet", "not a readable .parquet file"),
        ("t.xlsx", "unknown suffix '.xlsx'; choose .csv, .tsv or .parquet"),
        ("none.csv", "not found"),
    ):
        message = refusal(load, tmp_path / name)
        assert message.startswith("data.path: ") and str(tmp_path / name) in message
        assert "UserError" not in message
        assert words in message


def test_announced_cells_of_parquet_are_compared_with_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A column of equal values takes a few bytes for a million rows."""
    pytest.importorskip("pyarrow")
    FRAME.to_parquet(tmp_path / "t.parquet")
    monkeypatch.setattr(Path, "read_text", lambda _: "MemAvailable: 0 kB")
    monkeypatch.setattr(pd, "read_parquet", lambda _: pytest.fail("read"))

    check_refused(r"t\.parquet: needs 0\.0 GiB of memory", load, tmp_path / "t.parquet")


def load_text(
    path: Path, text: str, label: str = "ill", task: str | None = None, **read: str
) -> Dataset:
    path.write_text(text, encoding="utf-8")
    source = {"name": "table", "path": str(path), "label": label, "task": task}
    return load_source(SourceConfig.model_validate({**source, "read": read or None}), path.parent)


@each_case(
    ("decimal", "thousands", "numbers", "refused"),
    (
        (
            ",",
            ".",
            {"1.234,5": 1234.5, "-12.345.678": -12345678, "1234,5": 1234.5, ",5": 0.5, "7": 7},
            (
                "0.5",
                "0.125",
                "012.345",
                "1.23",
                "1234.567",
                "1.2345",
                ".123",
                "1.234.56",
                "1,234.5",
                "1'234",
            ),
        ),
        (
            ",",
            None,
            {"1,5": 1.5, "-12": -12, "2,5e3": 2500},
            ("0.5", "1.234", "1.234,5", "1,234,5"),
        ),
        (".", ",", {"1,234.5": 1234.5, "0.5": 0.5, " 12,000 ": 12000}, ("1,5", "1.234,5", "12,34")),
        (".", "'", {"1'234.5": 1234.5, "0.5": 0.5}, ("1'5", "1’234", "1,5", "'123")),
        (".", "’", {"1’234.5": 1234.5}, ("1’5", "1'234")),
        (".", "_", {"1_234": 1234}, ("1_5", "12_34")),
        (",", " ", {"1 234,5": 1234.5, "12\u202f345\xa0678": 12345678}, ("1 5", "0.5", "1234 567")),
    ),
)
def test_marks_separate_groups_of_three_digits(
    decimal: str,
    thousands: str | None,
    numbers: dict[str, float],
    refused: tuple[str, ...],
    tmp_path: Path,
) -> None:
    path = tmp_path / "t.csv"
    read = {"sep": ";", "decimal": decimal, **({"thousands": thousands} if thousands else {})}
    rows = [f"{cell};{i % 2}" for i, cell in enumerate(numbers)]

    found = load_text(path, "\n".join(["dose;ill", *rows, "1;0", "1;1"]), **read)

    assert found.train.x.flatten().tolist() == [*numbers.values(), 1, 1]
    for cell in refused:
        text = "\n".join(["dose;ill", *rows, f"{cell};0", "1;1"])
        message = refusal(load_text, path, text, **read)
        place = f"row {len(rows) + 1}, column 'dose': expected a number with "
        assert place in message and f", got '{cell}'; correct the cell" in message


def test_wrong_separator_is_named(tmp_path: Path) -> None:
    message = refusal(load_text, tmp_path / "t.csv", "dose,ill\n1,0\n2,1\n", sep=";")

    assert "not found in " in message
    assert "whose only column is 'dose,ill'; set the separator in data.read.sep" in message


@each_case("cell", ["abc", "1 234", "1.23.456", "3,5 mg"])
def test_one_wrong_cell_does_not_drop_a_column_of_numbers(cell: str, tmp_path: Path) -> None:
    rows = [f"{i / 7:.3f};{i % 2}".replace(".", ",") for i in range(40)]
    text = "\n".join(["dose;ill", *rows, f"{cell};1"])

    message = refusal(load_text, tmp_path / "t.csv", text, sep=";", decimal=",", thousands=".")

    assert f"row 41, column 'dose': expected a number, got '{cell}'" in message


COMMA_HINT = "write numbers as 1234.5, or name the marks in data.read.decimal"


@each_case(
    ("text", "read", "words"),
    (
        (
            "crp;ill\n0,5;0\n1,5;1\n",
            {},
            f"row 1, column 'crp': expected a number, got '0,5'; {COMMA_HINT}",
        ),
        (
            "crp;ill\n7;0\n1,5;1\n",
            {},
            f"row 2, column 'crp': expected a number, got '1,5'; {COMMA_HINT}",
        ),
        (
            "crp;ill\n1,250;0\n3,500;1\n",
            {},
            f"row 1, column 'crp': expected a number, got '1,250'; {COMMA_HINT}",
        ),
        (
            "crp;ill\n-;0\n0,5;0\n1,5;1\n",
            {},
            f"row 2, column 'crp': expected a number, got '0,5'; {COMMA_HINT}",
        ),
        ("crp;ill\n1;0,5\n3;1,5\n", {}, "row 1, column 'ill': expected a number, got '0,5'"),
        (
            "crp;ill\n1.234,5;0\n3.000,5;1\n",
            {},
            f"row 1, column 'crp': expected a number, got '1.234,5'; {COMMA_HINT}",
        ),
        (
            "crp;dose;ill\n0,5;1.250;0\n3,5;2.500;1\n",
            {"decimal": ","},
            "row 1, column 'dose': expected a number with the decimal mark ',', got '1.250'; "
            "correct the cell, or set data.read.decimal and thousands",
        ),
        (
            "crp;ill\n0,5;0\n1.5;1\n",
            {"decimal": ","},
            "row 2, column 'crp': expected a number with the decimal mark ',', got '1.5'",
        ),
        ("a;b,c;ill\n3,4;5;6;7\n", {}, "row 1: expected 3 cells as in the header, got 4"),
        (
            "crp,ill\n,0\n2,1\n,1\n",
            {},
            "row 1, column 'crp': missing value (2 in 3 rows); fill or remove missing values",
        ),
        ("crp,ill\n1, \n2,1\n", {}, "row 1, column 'ill': missing value (1 in 2 rows)"),
    ),
)
def test_cells_in_another_form_raise_one_line(
    text: str, read: dict[str, str], words: str, tmp_path: Path
) -> None:
    refused = refusal(load_text, tmp_path / "t.csv", text, **read)
    assert refused.startswith(f"data.path: {tmp_path / 't.csv'}: ") and words in refused


def test_task_follows_the_configuration(tmp_path: Path) -> None:
    path, text = tmp_path / "t.csv", "x,a,b\n1,0,1\n2,1,1\n"
    for label, task, kind, outputs in (
        ("a", None, "multiclass", 2),
        ("a", "regression", "regression", 1),
        ("a", "multilabel", "multilabel", 1),
        ("a,b", "regression", "regression", 2),
    ):
        found = load_text(path, text, label, task).task
        assert (found.kind, found.outputs) == (kind, outputs)
    many = "x,a\n" + "".join(f"{i},{i}\n" for i in range(30))
    assert load_text(path, many, "a").task.kind == "regression"
    assert load_text(path, many, "a", "multiclass").task.outputs == 30
    assert load_text(path, 'x,a\n1,"1,5"\n2,"2,5"\n', "a", "multiclass").task.names == (
        "1,5",
        "2,5",
    )
    for label, task, words in (
        (
            "a,b",
            "multiclass",
            "label a, b: a multiclass task needs one column of labels or one-hot rows, got 2",
        ),
        ("x", "multilabel", "label x: row 2: multilabel targets must be 0 or 1"),
    ):
        check_refused(words, load_text, path, text, label, task)
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
    check_refused(
        r"expected 6x5 pixels as in 0\.png, got 9x9; set data\.size", load_source, source, tmp_path
    )
    assert load_source(source.model_copy(update={"size": 8}), tmp_path).train.x.shape == (
        2,
        1,
        8,
        8,
    )
