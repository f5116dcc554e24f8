"""Evaluation on files with reordered columns, on recordings and on training rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import hetero_fl
from hetero_fl.cli import main
from hetero_fl.data.sources.files import EMBEDDED
from hetero_fl.experiment import evaluate
from hetero_fl.utils.errors import UserError
from tests.support.cases import each_case
from tests.support.mistakes import check_refused

# some tests score the file that the run was trained on
pytestmark = pytest.mark.filterwarnings("ignore:.*are also in the run's training rows:UserWarning")


def finished(folder: Path, **data: Any) -> hetero_fl.Run:
    torch.set_num_threads(1)
    view = data.pop("preprocess", {})
    source = {
        "name": "named",
        "rounds": 1,
        "data": {**data, "proxy": {"size": 20}},
        "clients": {
            "defaults": {
                "model": {"name": "mlp", "hidden": [8]},
                "preprocess": {"normalize": "own", **view},
            },
            "groups": [{"name": "c", "count": 2}],
        },
        "algorithm": {"name": "fedavg"},
        "runtime": {"threads": 1, "executor": "serial"},
        "output": {"plots": False, "report": False},
    }
    return hetero_fl.run(source, out=folder / "run")


@each_case(
    ("view", "absent"),
    [
        ({}, None),
        ({"columns": ["a", "b"]}, "c"),
        ({"columns": ["a", "b"], "missing": "indicate"}, "b"),
    ],
)
def test_evaluate_and_predict_match_columns_by_name(
    view: dict[str, Any], absent: str | None, tmp_path: Path
) -> None:
    x = np.random.default_rng(0).normal(size=(300, 3)).astype(np.float32) * [1, 10, 100]
    features = pd.DataFrame(x, columns=["a", "b", "c"])
    frame = features.assign(y=(x[:, 0] > 0).astype(int))
    turned = frame[["c", "y", "b", "a"]]
    for name, rows in (("t", frame), ("turned", turned), ("less", frame.drop(columns="a"))):
        rows.to_csv(tmp_path / f"{name}.csv", index=False)
    run = finished(tmp_path, name="table", path=str(tmp_path / "t.csv"), label="y", preprocess=view)

    scores = evaluate(run, str(tmp_path / "t.csv"))
    assert evaluate(run, str(tmp_path / "turned.csv")) == scores
    assert evaluate(run, turned, label="y") == scores
    expected = run.predict("c_1", x)
    assert run.predict("c_1", features[["c", "b", "a"]]).equals(expected)
    # Additional columns are ignored.
    with_label = features.assign(y=1, pid="p7")
    assert run.predict("c_1", with_label).equals(expected)
    assert run.predict("c_1", features[5:8]).index.tolist() == [5, 6, 7]
    if absent is not None:
        with_nan = torch.tensor(features.assign(**{absent: np.nan}).to_numpy())
        found = run.predict("c_1", with_label.drop(columns=absent))
        assert found.equals(run.predict("c_1", with_nan))
    mistakes = [
        (with_label.rename(columns={"a": "A"}), "x: column 'a' not found, .*; did you mean 'A'"),
        (features[["a", "b", "b"]], "predict: x: column 'b' occurs 2 times"),
        (features.assign(b="much"), "predict: x: column 'b': expected numbers, got text"),
    ]
    if "missing" not in view:
        without = with_label[["pid", "b", "c"]]
        mistakes.append((without, "column 'a' not found, which the model needs$"))
        words = "data: table: column 'a' not found, which the run's data contains"
        check_refused(words, evaluate, run, str(tmp_path / "less.csv"))
    for wrong, words in mistakes:
        check_refused(words, run.predict, "c_1", wrong)


def test_evaluate_client_needs_only_the_columns_of_this_client(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(300, 2))
    frame = pd.DataFrame(x, columns=["a", "b"]).assign(y=(x[:, 0] > 0).astype(int))
    frame.to_csv(tmp_path / "t.csv", index=False)
    frame.drop(columns="b").to_csv(tmp_path / "less.csv", index=False)
    source = {
        "rounds": 1,
        "data": {"name": "table", "path": str(tmp_path / "t.csv"), "label": "y"},
        "clients": {
            "groups": [
                {"name": name, "model": "mlp", "preprocess": {"columns": [name]}} for name in "ab"
            ],
        },
        "algorithm": {"name": "local"},
        "output": {"plots": False, "report": False},
    }
    run = hetero_fl.run(source, out=tmp_path / "run")

    scores = evaluate(run, str(tmp_path / "less.csv"), "a")

    assert scores == evaluate(run, str(tmp_path / "t.csv"), "a")
    with pytest.raises(UserError, match="column 'b' not found"):
        evaluate(run, str(tmp_path / "less.csv"), "b")


def test_evaluate_cuts_recordings_as_the_run(tmp_path: Path) -> None:
    draws = np.random.default_rng(0)
    frame = pd.DataFrame(draws.normal(size=(2000, 2)), columns=["ax", "ay"])
    frame["activity"] = np.repeat(["sit", "walk"] * 10, 100)
    frame.to_csv(tmp_path / "r.csv", index=False)
    run = finished(tmp_path, name="activity", path=str(tmp_path / "r.csv"), windows={"length": 20})
    found = evaluate(run, str(tmp_path / "r.csv"))
    assert {"c_1", "c_2"} <= set(found) and found["c_1"]["accuracy"] is not None


def test_evaluate_reads_arrays_of_recordings_and_drives(
    tmp_path: Path, subtests: pytest.Subtests
) -> None:
    for name in ("speech", "driving"):
        with np.load(EMBEDDED / f"{name}.npz") as file:
            arrays = dict(file)
        folder = tmp_path / name
        folder.mkdir()
        np.savez(folder / "new.npz", **arrays)
        np.savez(folder / "images.npz", train_images=np.zeros((4, 8)), train_labels=np.arange(4))
        with subtests.test(name=name):
            gap = {"driving": {"gap": 5, "scale": 2.0}} if name == "driving" else {}
            run = finished(folder, name=name, **gap)

            assert evaluate(run, str(folder / "new.npz")) == evaluate(run, name)
            words = r"^data: .*images.npz(: expected class names as in| has examples of shape)"
            check_refused(words, evaluate, run, str(folder / "images.npz"))
            np.savez(folder / "bad.npz", **{**arrays, "split": np.array(3)})
            words = r"^data: .*bad\.npz: split: expected shape"
            check_refused(words, evaluate, run, str(folder / "bad.npz"))


def test_evaluate_reads_arrays_and_tables_of_one_run(tmp_path: Path) -> None:
    hours = pd.date_range("2024-01-01", periods=700, freq="h")
    frame = pd.DataFrame({"DateTime": hours, "Vehicles": np.arange(700) % 24 + 0.5})
    text = frame.assign(DateTime=hours.strftime("%d.%m.%Y %H:%M"), Junction="1")
    text.to_csv(tmp_path / "t.csv", sep=";", decimal=",", index=False)
    np.savez(
        tmp_path / "t.npz",
        **{name: frame[name].to_numpy() for name in ("DateTime", "Vehicles")},
        Junction=np.full(700, "1"),
    )
    keys = {"series": {"format": "%d.%m.%Y %H:%M", "window": 6}, "read": {"decimal": ","}}
    preprocess = {"missing": "indicate"}
    path = str(tmp_path / "t.csv")
    run = finished(tmp_path, name="traffic", path=path, preprocess=preprocess, **keys)

    assert evaluate(run, path) == evaluate(run, str(tmp_path / "t.npz"))


def test_evaluate_warns_about_training_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x = np.random.default_rng(0).normal(size=(200, 2))
    frame = pd.DataFrame(x, columns=["a", "b"]).assign(y=(x[:, 0] > 0).astype(int))
    frame.to_csv(tmp_path / "t.csv", index=False)
    frame.assign(a=-frame["a"]).to_csv(tmp_path / "new.csv", index=False)
    run = finished(tmp_path, name="table", path=str(tmp_path / "t.csv"), label="y")
    note = (
        f"of the 200 rows of {tmp_path / 't.csv'} are also in the run's training rows: "
        "scores are too optimistic for the models"
    )
    trained = run.summary["data"]["n_train"]
    assert 0 < trained < 200

    with pytest.warns(UserWarning, match="training rows") as caught:
        evaluate(run, str(tmp_path / "t.csv"))
    assert main(["evaluate", str(run.path), "--data", str(tmp_path / "t.csv")]) == 0

    assert [str(w.message) for w in caught] == [f"{trained} {note}"]
    assert capsys.readouterr().err == f"note: {trained} {note}\n"
    assert main(["evaluate", str(run.path), "--data", str(tmp_path / "new.csv")]) == 0
    assert capsys.readouterr().err == ""
    for content in (b"damaged", b"HFLCKPT1"):
        for file in (run.path / "checkpoint").glob("round-*.ckpt"):
            file.write_bytes(content)
        with pytest.warns(UserWarning, match="training rows"):
            evaluate(run, str(tmp_path / "t.csv"))
