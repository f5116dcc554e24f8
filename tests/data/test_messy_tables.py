"""Tables as people have them: numbered columns, saved indices, markers and separators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from pandas._libs.parsers import STR_NA_VALUES

import hetero_fl as hfl
from hetero_fl.config.data import SourceConfig
from hetero_fl.data import join_images_and_table
from hetero_fl.data.external import load_unlabeled
from hetero_fl.data.registry import load_source
from hetero_fl.data.sources.objects import to_dataset
from hetero_fl.experiment.datasets import FederationDatasets
from hetero_fl.utils.text import Caution
from tests.support.cases import each_case
from tests.support.mistakes import check_refused
from tests.support.python_federations import QUIET


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


@each_case("owner", ("client", "federation"))
def test_label_may_be_the_number_of_a_column(owner: str) -> None:
    frame = make_frame().set_axis([0, 1, 2], axis=1)
    labels = {owner: {"label": 2}}
    clients = [
        hfl.Client(f"site_{i}", "linear", frame, **labels.get("client", {})) for i in range(2)
    ]

    federation = hfl.Federation(clients, **labels.get("federation", {}))

    assert layout_of(federation).columns == ("0", "1")


def test_saved_index_is_no_feature(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    frame = make_frame()
    shuffled = frame.sample(frac=1, random_state=0)
    for header in (None, "Unnamed: 0", "Unnamed: 0.1"):
        shuffled.to_csv(path, index_label=header)
        assert layout_of(federate(path)).columns == ("age", "dose"), header
    frame.set_index(frame.index / 2).to_csv(path)
    assert layout_of(federate(path)).columns == ("age", "dose")


def test_feature_with_the_name_of_an_index_level_is_kept() -> None:
    frame = make_frame()
    levels = frame.assign(level_0=frame.index, level_1=frame.index % 7)

    dataset = to_dataset(levels, "data", "sick")

    assert dataset.columns == ("age", "dose", "level_1")
    assert "left out: level_0 (saved index)" in dataset.notes[0]


def test_column_without_a_name_that_repeats_is_left_out_with_a_caution() -> None:
    frame = make_frame()

    dataset = to_dataset(frame.assign(**{"Unnamed: 3": frame.index % 7}), "data", "sick")

    (caution,) = (note for note in dataset.notes if isinstance(note, Caution))
    assert dataset.columns == ("age", "dose")
    assert "'Unnamed: 3' has no name and repeats" in caution


def test_nullable_column_without_values_is_read() -> None:
    frame = make_frame()

    dataset = to_dataset(frame.assign(empty=pd.array([None] * 100, dtype="Int64")), "data", "sick")

    assert dataset.columns == ("age", "dose", "empty")
    assert bool(dataset.train.x[:, 2].isnan().all())


def test_marker_among_numbers_is_a_missing_value(tmp_path: Path) -> None:
    frame = make_frame()
    blank = frame.assign(age=frame.age.mask(frame.index % 9 == 0))

    def scores(marker: str, name: str) -> Any:
        blank.to_csv(tmp_path / "table.csv", index=False, na_rep=marker)
        run = federate(tmp_path / "table.csv").train(
            hfl.FedAvg(), rounds=1, overrides=QUIET, out=tmp_path / name
        )
        return run.metrics[0]["clients"]

    expected = scores("", "expected")
    for number, marker in enumerate(("?", "NA", "-", ".", "n/a", "--", "missing", " ? ")):
        assert scores(marker, f"run{number}") == expected, marker


def public_rows(frame: pd.DataFrame, folder: Path) -> torch.Tensor:
    """Return the values of a table without labels, as a proxy set."""
    frame.to_csv(folder / "public.csv", index=False)
    config = SourceConfig(name="table", path=str(folder / "public.csv"))
    return load_unlabeled(config, folder, "proxy").train.x


def joined_rows(frame: pd.DataFrame, folder: Path) -> torch.Tensor:
    """Return the values of a file that is joined with images."""
    frame.assign(patient=frame.index).to_csv(folder / "joined.csv", index=False)
    images = np.zeros((len(frame), 1, 1), np.uint8)
    classes = frame.index % 2
    dataset = join_images_and_table(images, classes, frame.index, folder / "joined.csv")
    return dataset.train.x[:, 1:]


def hub_rows(frame: pd.DataFrame, _folder: Path) -> torch.Tensor:
    """Return the values of a Hugging Face data set."""
    datasets = pytest.importorskip("datasets")
    labeled = datasets.Dataset.from_pandas(frame.assign(sick=frame.index % 2))
    return to_dataset(labeled, "hub", "sick").train.x


@each_case("read", (public_rows, joined_rows, hub_rows))
def test_question_mark_is_a_missing_value_in_every_source(read: Any, tmp_path: Path) -> None:
    frame = make_frame(20).drop(columns="sick")
    marked = frame.astype({"dose": str})
    marked.loc[3, "dose"] = "?"

    values = read(marked, tmp_path)

    expected = torch.tensor(frame.to_numpy(), dtype=torch.float32)
    expected[3, 1] = torch.nan
    assert torch.equal(values.nan_to_num(-9), expected.nan_to_num(-9))


def test_frame_and_file_are_applied_like_the_training_data(tmp_path: Path) -> None:
    frame = make_frame().set_axis([2, 1, 0], axis=1)
    marked = frame.astype({1: str})
    marked.loc[3, 1] = "?"
    preprocess = hfl.Preprocess(missing="indicate")
    client = hfl.Client("a", "linear", marked, label=0, preprocess=preprocess)
    run = hfl.Federation([client]).train(hfl.Local(), rounds=1, overrides=QUIET)
    values = frame[[2, 1]].to_numpy(copy=True)
    values[3, 1] = np.nan
    with (tmp_path / "ROWS.NPZ").open("wb") as file:
        np.savez(file, train_images=frame[[2, 1]], train_labels=frame[0])

    predicted = run.predict("a", marked)
    of_frame = hfl.evaluate(run, frame, label=0, log=print)
    of_file = hfl.evaluate(run, tmp_path / "ROWS.NPZ", log=print)

    assert torch.equal(predicted, run.predict("a", values))
    assert of_frame["a"]["accuracy"] == of_file["a"]["accuracy"]


def test_question_mark_as_label_is_a_missing_value(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    frame = make_frame()
    frame.assign(sick=frame.sick.map({0: "no", 1: "yes"}).mask(frame.index == 3, "?")).to_csv(path)

    check_refused(r"row 4, column 'sick': missing value", layout_of, federate(path))


def test_minus_sign_among_text_is_a_category(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    frame = make_frame()
    frame.assign(test=np.where(frame.dose > 0, "+", "-")).to_csv(path, index=False)

    assert layout_of(federate(path)).categories == (("test", ("+", "-")),)


def test_csv_file_may_have_any_usual_separator_and_name(tmp_path: Path) -> None:
    for separator, name in (
        (",", "at\u202f3\u00a0PM"),
        (";", "me\u0301decins"),
        ("|", "\u200esites"),
        ("\t", "می\u200cشود"),
    ):
        path = tmp_path / f"{name}.csv"
        make_frame().to_csv(path, index=False, sep=separator)
        assert layout_of(federate(path)).columns == ("age", "dose"), name


def test_backslash_in_double_quotes_is_refused(tmp_path: Path, subtests: pytest.Subtests) -> None:
    for written in (
        r'"C:\new\table.csv"',
        r'"C:\data\table.csv"',
        r'"..\users\x.csv"',
        r'"\_a.csv"',
        r'"~none/\_a.csv"',
    ):
        for suffix in ("yaml", "json"):
            for key in ('"path"', '"text": {"public"'):
                with subtests.test(written=written, suffix=suffix):
                    path = tmp_path / f"run.{suffix}"
                    close = "}" * key.count("{")
                    path.write_text(
                        f'{{"data": {{"name": "text", {key}: {written}{close}}}}}', encoding="utf-8"
                    )

                    check_refused(r"write / or .* instead", hfl.load_config, path)


def test_listed_categories_are_no_missing_values(tmp_path: Path) -> None:
    frame = pd.DataFrame({"test": ["+", "?"] * 10, "grade": ["1", "NA"] * 10, "sick": [0, 1] * 10})
    frame.to_csv(tmp_path / "table.csv", index=False)
    listed = {"test": ("+", "?"), "grade": ("1", "NA")}
    config = SourceConfig(
        name="table", path=str(tmp_path / "table.csv"), label="sick", categories=listed
    )

    from_file = load_source(config, tmp_path)
    from_frame = to_dataset(frame, "data", "sick", categories=listed)

    expected = torch.eye(2).repeat(10, 2)
    assert torch.equal(from_file.train.x, expected)
    assert torch.equal(from_frame.train.x, expected)


def test_all_markers_of_pandas_are_missing_values_in_listed_columns(tmp_path: Path) -> None:
    markers = sorted(STR_NA_VALUES)
    cells = [*markers, "+", "-"]
    frame = pd.DataFrame({"test": cells, "age": range(len(cells))})
    frame["sick"] = frame.age % 2
    frame.to_csv(tmp_path / "table.csv", index=False)
    listed = {"test": ("+", "-")}
    config = SourceConfig(
        name="table", path=str(tmp_path / "table.csv"), label="sick", categories=listed
    )

    from_file = load_source(config, tmp_path)
    from_frame = to_dataset(frame, "data", "sick", categories=listed)

    for dataset in (from_file, from_frame):
        indicators = dataset.train.x[:, [dataset.columns.index(n) for n in ("test=+", "test=-")]]
        assert bool((indicators[: len(markers)] == 0).all())
        assert torch.equal(indicators[len(markers) :], torch.eye(2))
        assert not [note for note in dataset.notes if "#NA" in note or "-nan" in note]


def test_declared_categories_keep_their_order_and_those_without_rows() -> None:
    declared = {
        "dose": pd.Categorical(["low", "high"] * 10, categories=["low", "mid", "high"]),
        "stage": pd.Categorical(["2", "1"] * 10, categories=["2", "1"]),
        "test": pd.Categorical(["?", "+"] * 10, categories=["?", "+"]),
    }
    frame = pd.DataFrame({**declared, "sick": [0, 1] * 10})
    site = frame[frame.dose == "low"]

    datasets = FederationDatasets(
        [hfl.Client("a", "linear", frame), hfl.Client("b", "linear", site)], {}, "sick"
    ).datasets

    expected = pd.get_dummies(site.drop(columns="sick"), prefix_sep="=").astype(np.float32)
    own = datasets["clients: 'b': data"]
    assert own.columns == tuple(expected.columns)
    assert np.array_equal(own.train.x.numpy(), expected.to_numpy())


def test_columns_do_not_depend_on_the_order_of_clients() -> None:
    frames = [
        pd.DataFrame({"dose": pd.Categorical(values * 10, categories=values), "sick": [0, 1] * 10})
        for values in (["low", "high"], ["high", "mid"])
    ]

    def columns(order: list[int]) -> list[tuple[str, ...]]:
        clients = [hfl.Client(f"site_{i}", "linear", frames[i]) for i in order]
        found = FederationDatasets(clients, {}, "sick").datasets.values()
        return [dataset.columns for dataset in found]

    assert columns([0, 1]) == columns([1, 0]) == [("dose=high", "dose=low", "dose=mid")] * 2


def test_columns_of_frames_that_are_no_features_are_one_warning() -> None:
    def frame(rows: int) -> pd.DataFrame:
        text = [f"remark {i % 30} of a nurse" for i in range(rows)]
        when = pd.date_range("2024-01-01", periods=rows)
        return pd.DataFrame({"age": range(rows), "note": text, "when": when, "y": 0}).assign(
            y=[i % 2 for i in range(rows)], ward=["a", "b"] * (rows // 2)
        )

    clients = [hfl.Client("a", "mlp", frame(60)), hfl.Client("b", "mlp", frame(80))]

    prepared = hfl.Federation(clients, label="y", test=frame(40)).prepare(hfl.Local())

    found = [note for note in prepared.notes if "left out of the features" in note]
    assert len(found) == 1 and isinstance(found[0], Caution)
    assert "features: 'note', 'when'; convert them to numbers" in found[0]


@each_case("digits", (400, 5000))
def test_integer_of_many_digits_is_no_number(digits: int, tmp_path: Path) -> None:
    frame = make_frame().assign(age=range(100)).astype(object)
    frame.iloc[5, 0] = "9" * digits
    frame.to_csv(tmp_path / "a.csv", index=False)

    check_refused("row 6, column 'age': expected a", layout_of, federate(tmp_path / "a.csv"))
