"""Tables as people have them: numbered columns, indices, markers, separators and text columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from pandas._libs.parsers import STR_NA_VALUES

import hetero_fl as hfl
from hetero_fl.config.clients import ClientSettings, PreprocessConfig
from hetero_fl.config.data import DataConfig, ProxyConfig, SourceConfig
from hetero_fl.data import (
    ColumnLayout,
    Dataset,
    FederatedData,
    Preprocess,
    federate,
    join_images_and_table,
    load_source,
)
from hetero_fl.data.external import load_unlabeled
from hetero_fl.data.federated_data import PublicPack
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


def federation_of(path: Path) -> hfl.Federation:
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


def test_marker_among_numbers_is_a_missing_value(tmp_path: Path) -> None:
    frame = make_frame()
    blank = frame.assign(age=frame.age.mask(frame.index % 9 == 0))

    def scores(marker: str, name: str) -> Any:
        blank.to_csv(tmp_path / "table.csv", index=False, na_rep=marker)
        run = federation_of(tmp_path / "table.csv").train(
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

    assert predicted.equals(run.predict("a", values))
    assert of_frame["a"]["accuracy"] == of_file["a"]["accuracy"]


def test_question_mark_as_label_is_a_missing_value(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    frame = make_frame()
    frame.assign(sick=frame.sick.map({0: "no", 1: "yes"}).mask(frame.index == 3, "?")).to_csv(path)

    check_refused(r"row 4, column 'sick': missing value", layout_of, federation_of(path))


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


def read_listed(frame: pd.DataFrame, folder: Path, **listed: tuple[str, ...]) -> list[Dataset]:
    """Read a table with listed categories from a file and from memory."""
    frame.to_csv(folder / "table.csv", index=False)
    source = SourceConfig(name="table", path=str(folder / "table.csv"), label="sick")
    return [load(source, categories=listed), to_dataset(frame, "data", "sick", categories=listed)]


def test_all_markers_of_pandas_are_missing_values_in_listed_columns(tmp_path: Path) -> None:
    markers = sorted(STR_NA_VALUES)
    cells = [*markers, "+", "-"]
    frame = pd.DataFrame({"test": cells, "age": range(len(cells))})
    frame["sick"] = frame.age % 2

    for dataset in read_listed(frame, tmp_path, test=("+", "-")):
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

    check_refused("row 6, column 'age': expected a", layout_of, federation_of(tmp_path / "a.csv"))


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


def test_columns_with_20_values_are_left_out(tmp_path: Path) -> None:
    for values, columns in ((19, 20), (20, 1)):
        source = table(tmp_path / "t.csv", wards=tuple(f"w{i}" for i in range(values)))
        assert len(load(source).columns) == columns
    check_refused("duplicate column 'ward=A'", load, table(tmp_path / "t.csv", **{"ward=A": 1.0}))


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

    check_refused(message, hfl.run, config, out=tmp_path / "run")


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
def finished(tmp_path_factory: pytest.TempPathFactory) -> hfl.Run:
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
    return hfl.run(config, out=folder / "run")


def test_predict_uses_encoding_of_run(finished: hfl.Run) -> None:
    frame = pd.DataFrame({"ward": ["B", "D", None], "crp": [0.5, -0.5, 0.0]})

    found = finished.predict("own", frame)

    rows = [[0.5, 0, 1, 0], [-0.5, 0, 0, 0], [0.0, 0, 0, 0]]
    assert found.equals(finished.predict("own", rows))
    check_refused(
        "column 'ward' not found, which the model needs", finished.predict, "own", frame[["crp"]]
    )
    check_refused(
        r"column 'ward' not found, .*; did you mean 'wrd'",
        finished.predict,
        "own",
        frame.rename(columns={"ward": "wrd"}),
    )


def test_new_file_uses_encoding_of_run(finished: hfl.Run, tmp_path: Path) -> None:
    from hetero_fl.experiment import join
    from hetero_fl.experiment.evaluation import order_columns

    path = tmp_path / "new.csv"
    source = table(path, 80, wards=("D", "B"), seed=3)
    frame = pd.read_csv(path)

    found = hfl.evaluate(finished, str(path))
    joined = join(finished, str(path), out=tmp_path / "join", patients=[20], seeds=[0], epochs=1)
    ordered = order_columns(load(source), finished.models)

    predicted = finished.predict("own", frame[["crp", "ward"]], personal=False)
    predicted = predicted.to_numpy().argmax(1)
    assert found["own"]["accuracy"] == pytest.approx((predicted == (frame.ill == "yes")).mean())
    assert joined["n_test"] == 16 and joined["rows"]
    assert load(source).columns == ("crp", "ward=B", "ward=D")
    assert ordered.columns == ("crp", "ward=A", "ward=B", "ward=C")
    assert ordered.train.x[:4, 1:].tolist() == [[0, 0, 0], [0, 1, 0]] * 2


def test_exported_models_score_text_columns(finished: hfl.Run, tmp_path: Path) -> None:
    from hetero_fl.experiment.exporting import score
    from hetero_fl.experiment.exporting.graph import inputs_of

    (record,) = inputs_of(finished.models["own"])
    (tmp_path / "new.csv").write_text("ward,crp\nB,0.5\n D ,-0.5\n,0\n")

    assert (
        record["categories"] == {"ward": ["A", "B", "C"]}
        and "NAME=VALUE is 1 where" in record["meaning"]
    )
    given = score.read_table(tmp_path / "new.csv", record)
    assert given.tolist() == [[0.5, 0, 1, 0], [-0.5, 0, 0, 0], [0, 0, 0, 0]]
    (tmp_path / "new.csv").write_text("crp\n0.5\n")
    with pytest.raises(ValueError, match="column 'ward' not found"):
        score.read_table(tmp_path / "new.csv", record)
