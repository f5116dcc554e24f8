"""Tables as people have them: numbered columns, saved indices, markers and separators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import hetero_fl as hfl
from hetero_fl.utils.errors import UserError


def make_frame(rows: int = 100) -> pd.DataFrame:
    """Return a table of two columns of numbers and a label."""
    values = np.random.default_rng(0).normal(size=(rows, 2)).round(3)
    return pd.DataFrame(values, columns=["age", "dose"]).assign(sick=np.arange(rows) % 2)


def federate(path: Path) -> hfl.Federation:
    """Return a federation of two clients that share a table."""
    config = {
        "data": {"name": "table", "path": str(path), "label": "sick"},
        "clients": {
            "defaults": {"preprocess": {"missing": "indicate"}},
            "groups": [{"name": "site", "count": 2, "model": "linear"}],
        },
    }
    return hfl.Federation.from_config(config)


def layout_of(federation: hfl.Federation) -> Any:
    """Return the names of the input columns, and the categories."""
    return federation.prepare(hfl.FedAvg()).federation.data.layout


@pytest.mark.parametrize("owner", ["client", "federation"])
def test_label_may_be_the_number_of_a_column(owner: str) -> None:
    frame = make_frame().set_axis([0, 1, 2], axis=1)
    labels = {owner: {"label": 2}}
    clients = [
        hfl.Client(f"site_{i}", "linear", frame, **labels.get("client", {})) for i in range(2)
    ]

    federation = hfl.Federation(clients, **labels.get("federation", {}))

    assert layout_of(federation).columns == ("0", "1")


@pytest.mark.parametrize("header", ["", "Unnamed: 0"])
def test_saved_index_is_no_feature(header: str, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    make_frame().sample(frac=1, random_state=0).to_csv(path, index_label=header or None)

    assert layout_of(federate(path)).columns == ("age", "dose")


@pytest.mark.parametrize("marker", ["?", "NA", "-", ".", "n/a", "--", "missing", " ? "])
def test_marker_among_numbers_is_a_missing_value(marker: str, tmp_path: Path) -> None:
    frame = make_frame()
    blank = frame.assign(age=frame.age.mask(frame.index % 9 == 0))
    blank.to_csv(tmp_path / "blank.csv", index=False)
    blank.to_csv(tmp_path / "marked.csv", index=False, na_rep=marker)

    marked, expected = (
        federate(tmp_path / f"{name}.csv").train(hfl.FedAvg(), rounds=1, out=tmp_path / name)
        for name in ("marked", "blank")
    )

    assert marked.metrics[0]["clients"] == expected.metrics[0]["clients"]


def test_question_mark_as_label_is_a_missing_value(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    frame = make_frame()
    frame.assign(sick=frame.sick.map({0: "no", 1: "yes"}).mask(frame.index == 3, "?")).to_csv(path)

    with pytest.raises(UserError, match=r"row 4, column 'sick': missing value"):
        layout_of(federate(path))


def test_minus_sign_among_text_is_a_category(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    frame = make_frame()
    frame.assign(test=np.where(frame.dose > 0, "+", "-")).to_csv(path, index=False)

    assert layout_of(federate(path)).categories == (("test", ("+", "-")),)


@pytest.mark.parametrize("separator", [",", ";", "|", "\t"])
def test_csv_file_may_have_any_usual_separator(separator: str, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    make_frame().to_csv(path, index=False, sep=separator)

    assert layout_of(federate(path)).columns == ("age", "dose")


@pytest.mark.parametrize(
    "written", [r'"C:\new\table.csv"', r'"C:\data\table.csv"', r'"..\users\x.csv"', r'"\_a.csv"']
)
def test_backslash_in_double_quotes_is_refused(written: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"data: {{name: table, path: {written}, label: y}}\n", encoding="utf-8")

    with pytest.raises(UserError, match=r"write / instead.*single quotes$"):
        hfl.load_config(path)
