"""Text columns of tables encoded as indicators, in training and in saved runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import hetero_fl
from hetero_fl.config.clients import ClientSettings, PreprocessConfig
from hetero_fl.config.data import DataConfig, ProxyConfig, SourceConfig
from hetero_fl.data import ColumnLayout, Dataset, FederatedData, Preprocess, federate, load_source
from hetero_fl.data.remote import PublicPack
from tests.support.cases import each_case
from tests.support.mistakes import check_refused

RAW = Preprocess()
WARDS = ("A", "B", "C")


def table(
    path: Path, rows: int = 60, wards: tuple[str, ...] = WARDS, seed: int = 0, **columns: Any
) -> SourceConfig:
    draws = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {"crp": draws.normal(size=rows), "ward": [wards[i % len(wards)] for i in range(rows)]}
    )
    frame["ill"] = np.where(frame.crp + (frame.ward == "A") > 0.3, "yes", "no")
    frame.assign(**columns).to_csv(path, index=False)
    return SourceConfig(name="table", path=str(path), label="ill")


def load(source: SourceConfig, **settings: Any) -> Dataset:
    return load_source(source.model_copy(update=settings), Path())


def federated(
    tmp_path: Path,
    common: SourceConfig,
    own: SourceConfig,
    proxy: SourceConfig | None = None,
    **preprocess: Any,
) -> FederatedData:
    config = DataConfig(**common.model_dump(), proxy=ProxyConfig(source=proxy))
    view = PreprocessConfig(**preprocess)
    clients = {
        "own": ClientSettings(data=own, preprocess=view),
        "rest": ClientSettings(preprocess=view),
    }
    return federate(load(common, categories=config.categories), config, clients, 0)


def test_text_columns_with_few_values_become_indicators(tmp_path: Path) -> None:
    source = table(
        tmp_path / "t.csv", note=[f"free text {i}" for i in range(60)], when="2024-01-01"
    )

    dataset = load(source)

    assert dataset.columns == ("crp", "ward=A", "ward=B", "ward=C", "when=2024-01-01")
    assert dataset.categories == (("ward", WARDS), ("when", ("2024-01-01",)))
    assert torch.equal(dataset.train.x[:6, 1:4], torch.eye(3).repeat(2, 1))
    assert dataset.notes == (
        "table t.csv: label ill; columns used: crp, ward, when; encoded "
        "as indicators: ward (A, B, C), when (2024-01-01); "
        "left out: note (text, 60 different values)",
    )


def test_columns_with_20_values_are_left_out(tmp_path: Path) -> None:
    for values, columns in ((19, 20), (20, 1)):
        source = table(tmp_path / "t.csv", wards=tuple(f"w{i}" for i in range(values)))
        assert len(load(source).columns) == columns
    check_refused("duplicate column 'ward=A'", load, table(tmp_path / "t.csv", **{"ward=A": 1.0}))


def test_configured_categories_take_precedence(tmp_path: Path) -> None:
    source = table(tmp_path / "t.csv", grade=[1, 2, 3] * 20)

    assert load(source, categories={}).columns == ("crp", "grade")
    assert "left out: ward (text)" in load(source, categories={}).notes[0]
    dataset = load(source, categories={"grade": ("3", "1", "2")})
    assert dataset.columns == ("crp", "grade=3", "grade=1", "grade=2")
    assert dataset.train.x[:3, 1:].tolist() == [[0, 1, 0], [0, 0, 1], [1, 0, 0]]


def test_empty_and_unknown_cells_are_zero_and_noted(tmp_path: Path) -> None:
    source = table(tmp_path / "t.csv", ward=["A", " B ", None, "C", ""] + ["A"] * 55)

    dataset = load(source, categories={"ward": ("A", "B")})

    assert dataset.train.x[:5, 1:].tolist() == [[1, 0], [0, 1], [0, 0], [0, 0], [0, 0]]
    assert dataset.notes[1:] == (
        (
            "table t.csv: column 'ward': 1 of 60 rows have none of "
            "A, B (row 4: 'C'); their indicators are 0"
        ),
        "table t.csv: column 'ward': 2 of 60 cells are empty (row 3); their indicators are 0",
    )


@each_case(
    ("categories", "message"),
    (
        ({"wrd": ["A"]}, r"data\.categories: column 'wrd' not found among the features of table"),
        ({"ill": ["yes"]}, r"data\.categories: column 'ill' not found among the features of table"),
        ({"ward": []}, "list each value once"),
        ({"ward": ["A", "A"]}, "list each value once"),
    ),
)
def test_wrong_categories_are_refused(categories: Any, message: str, tmp_path: Path) -> None:
    table(tmp_path / "t.csv")
    config = {
        "data": {
            "name": "table",
            "path": str(tmp_path / "t.csv"),
            "label": "ill",
            "categories": categories,
        },
        "clients": {"groups": [{"name": "a", "model": "tabular"}]},
        "algorithm": {"name": "local"},
    }

    check_refused(message, hetero_fl.run, config, out=tmp_path / "run")


def test_client_files_use_common_encoding(tmp_path: Path) -> None:
    common = table(tmp_path / "common.csv")
    own = table(tmp_path / "own.csv", wards=("C", "D"), seed=1, other=["x", "y"] * 30)

    data = federated(tmp_path, common, own)

    rows = data.columns("own", "train", RAW)["x"]
    assert data.layout.columns == ("crp", "ward=A", "ward=B", "ward=C") and rows.shape[1] == 4
    assert (rows[:, 1:3] == 0).all() and 0 < rows[:, 3].sum() < len(rows)
    assert [
        note for note in data.notes if "column 'ward': 30 of 60 rows have none of A, B, C" in note
    ]


def test_numeric_client_columns_use_common_text_encoding(tmp_path: Path) -> None:
    common = table(tmp_path / "common.csv", wards=("1", "2", "3a"))
    check_refused(
        r"expected a number, got '3a'; for categories, list the values in data\.categories",
        load,
        common,
    )
    common = common.model_copy(update={"categories": {"ward": ("1", "2", "3a")}})
    own = table(tmp_path / "own.csv", wards=("1", "2"), seed=1)

    rows = federated(tmp_path, common, own).columns("own", "train", RAW)["x"]

    assert torch.equal(rows[:, 1:3].sum(1), torch.ones(len(rows))) and (rows[:, 3] == 0).all()


def test_client_categories_must_match_common_ones(tmp_path: Path) -> None:
    own = table(tmp_path / "own.csv").model_copy(update={"categories": {"ward": ("B", "A")}})

    check_refused(
        r"clients: 'own': data\.categories: table encodes other values",
        federated,
        tmp_path,
        table(tmp_path / "common.csv"),
        own,
    )


def test_client_file_requires_used_columns(tmp_path: Path) -> None:
    common, own = table(tmp_path / "common.csv"), table(tmp_path / "own.csv")
    full = pd.read_csv(tmp_path / "own.csv")
    full.drop(columns="crp").to_csv(tmp_path / "own.csv", index=False)

    data = federated(tmp_path, common, own, columns=["ward"])

    assert data.columns("own", "train", data.preprocess("own"))["x"].sum(1).eq(1).all()
    full.drop(columns="ward").to_csv(tmp_path / "own.csv", index=False)
    for columns in (None, ["ward"]):
        check_refused(
            "column 'ward' not found, which the main data set co",
            federated,
            tmp_path,
            common,
            own,
            columns=columns,
        )
    rows = federated(tmp_path, common, own, missing="indicate").columns("own", "train", RAW)["x"]
    assert rows[:, 1:].isnan().all() and not rows[:, 0].isnan().any()


def test_proxy_tables_use_common_encoding(tmp_path: Path) -> None:
    common, proxy = (
        table(tmp_path / "common.csv"),
        table(tmp_path / "proxy.csv", wards=("B", "Z"), seed=2),
    )
    for label in (None, "ill"):  # files without labels are read differently
        source = proxy.model_copy(update={"label": label})
        if label is None:
            pd.read_csv(tmp_path / "proxy.csv").drop(columns="ill").to_csv(
                tmp_path / "bare.csv", index=False
            )
            source = source.model_copy(update={"path": str(tmp_path / "bare.csv")})
        rows = federated(tmp_path, common, table(tmp_path / "own.csv"), source).columns(
            "", "proxy", RAW
        )["x"]

        assert rows.shape == (60, 4)
        assert rows[:4, 1:].tolist() == [[0, 1, 0], [0, 0, 0]] * 2


def test_views_accept_text_column_names() -> None:
    layout = ColumnLayout(("crp", "ward=A", "ward=B", "age"), (), (("ward", ("A", "B")),))

    assert layout.names == ("crp", "ward", "age")
    assert layout.spans(["age", "ward"], "columns") == ((1, 4),)
    check_refused("unknown name 'ward=A'; did you mean 'ward'", layout.spans, ["ward=A"], "columns")


def test_provisioned_files_contain_the_encoding(tmp_path: Path) -> None:
    common, own = (
        table(tmp_path / "common.csv"),
        table(tmp_path / "own.csv", wards=("C", "D"), seed=1),
    )
    simulated = federated(tmp_path, common, own)
    pack = PublicPack.decode(PublicPack.from_data(simulated).encode())

    client_data = pack.data_of_client(
        "own", DataConfig(**common.model_dump()), {"own": ClientSettings(data=own)}, 0
    )

    assert client_data.layout == simulated.layout
    for split in ("train", "validation", "test"):
        assert torch.equal(
            client_data.columns("own", split, RAW)["x"], simulated.columns("own", split, RAW)["x"]
        )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> hetero_fl.Run:
    folder = tmp_path_factory.mktemp("finished")
    table(folder / "common.csv", 200)
    table(folder / "own.csv", 80, wards=("C", "D"), seed=1)
    source = {"name": "table", "label": "ill"}
    config = {
        "rounds": 2,
        "data": {**source, "path": str(folder / "common.csv")},
        "clients": {
            "defaults": {"model": "tabular", "preprocess": {"normalize": "own"}},
            "groups": [
                {"name": "common"},
                {"name": "own", "data": {**source, "path": str(folder / "own.csv")}},
            ],
        },
        "algorithm": {"name": "fedavg"},
        "output": {"plots": False, "report": False},
    }
    return hetero_fl.run(config, out=folder / "run")


def test_predict_uses_encoding_of_run(finished: hetero_fl.Run) -> None:
    frame = pd.DataFrame({"ward": ["B", "D", None], "crp": [0.5, -0.5, 0.0]})

    found = finished.predict("own", frame)

    rows = [[0.5, 0, 1, 0], [-0.5, 0, 0, 0], [0.0, 0, 0, 0]]
    assert torch.equal(found, finished.predict("own", rows))
    check_refused(
        "column 'ward' not found, which the model needs", finished.predict, "own", frame[["crp"]]
    )
    check_refused(
        r"column 'ward' not found, .*; did you mean 'wrd'",
        finished.predict,
        "own",
        frame.rename(columns={"ward": "wrd"}),
    )


def test_new_file_uses_encoding_of_run(finished: hetero_fl.Run, tmp_path: Path) -> None:
    from hetero_fl.experiment import join
    from hetero_fl.experiment.evaluation import order_columns

    path = tmp_path / "new.csv"
    source = table(path, 80, wards=("D", "B"), seed=3)
    frame = pd.read_csv(path)

    found = hetero_fl.evaluate(finished, str(path))
    joined = join(finished, str(path), out=tmp_path / "join", patients=[20], seeds=[0], epochs=1)
    ordered = order_columns(load(source), finished, finished.models)

    predicted = finished.predict("own", frame[["crp", "ward"]], personal=False).argmax(1).numpy()
    assert found["own"]["accuracy"] == pytest.approx((predicted == (frame.ill == "yes")).mean())
    assert joined["n_test"] == 16 and joined["rows"]
    assert load(source).columns == ("crp", "ward=B", "ward=D")
    assert ordered.columns == ("crp", "ward=A", "ward=B", "ward=C")
    assert ordered.train.x[:4, 1:].tolist() == [[0, 0, 0], [0, 1, 0]] * 2


def test_exported_models_score_text_columns(finished: hetero_fl.Run, tmp_path: Path) -> None:
    from hetero_fl.experiment.exporting import score
    from hetero_fl.experiment.exporting.graph import inputs_of

    (one,) = inputs_of(finished.models["own"])
    record = one.record()
    (tmp_path / "new.csv").write_text("ward,crp\nB,0.5\n D ,-0.5\n,0\n")

    assert (
        record["categories"] == {"ward": ["A", "B", "C"]}
        and "NAME=VALUE is 1 where" in record["meaning"]
    )
    given = score._read_csv(tmp_path / "new.csv", [record])["row"]
    assert given.tolist() == [[0.5, 0, 1, 0], [-0.5, 0, 0, 0], [0, 0, 0, 0]]
    (tmp_path / "new.csv").write_text("crp\n0.5\n")
    with pytest.raises(score.ScoringError, match="column 'ward' not found"):
        score._read_csv(tmp_path / "new.csv", [record])
