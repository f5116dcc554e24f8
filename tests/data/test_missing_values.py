"""Missing values: NaN, masked and null entries, and messages that name the file and the row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

import hetero_fl as hfl
from hetero_fl.data import Vocabulary, from_arrays
from tests.support.cases import each_case
from tests.support.mistakes import check_refused, refusal
from tests.support.python_federations import QUIET

Y = np.arange(60) % 2


def frame(gap: int | None = None, rows: int = 60) -> pd.DataFrame:
    values = np.random.default_rng(0).normal(size=(rows, 3))
    if gap is not None:
        values[gap - 1, 1] = np.nan
    return pd.DataFrame(values, columns=["age", "dose", "rate"]).assign(ill=Y[:rows])


def save(path: Path, gap: int | None = None) -> dict[str, Any]:
    frame(gap).to_csv(path, index=False)
    return {"name": "table", "path": str(path), "label": "ill"}


def refused(config: dict[str, Any]) -> str:
    return refusal(lambda: hfl.Federation.from_config(config).prepare("local"))


@each_case("gap", (1, 6, 60))
def test_missing_value_names_the_file_and_its_row(gap: int, tmp_path: Path) -> None:
    whole = save(tmp_path / "whole.csv")
    own = save(tmp_path / "own.csv", gap)
    defaults = {"model": "mlp", "preprocess": {"missing": "indicate"}}
    strict: dict[str, Any] = {"preprocess": {"missing": None}}
    groups = [
        {"name": "a", "data": {"name": "table", "path": own["path"]}, **strict},
        {"name": "b"},
    ]
    separate = {"data": whole, "clients": {"defaults": defaults, "groups": groups}}
    files = [save(tmp_path / f"{name}.csv", gap if name == "b" else None) for name in "ab"]
    pooled = {
        "data": {"name": "table", "label": "ill"},
        "clients": {
            "defaults": defaults,
            "groups": [
                {
                    "name": name,
                    "data": {"name": "table", "path": file["path"]},
                    **(strict if name == "b" else {}),
                }
                for name, file in zip("ab", files, strict=True)
            ],
        },
    }
    main = {
        "data": save(tmp_path / "main.csv", gap) | {"partition": {"min_size": 5}},
        "clients": {
            "count": 2,
            "defaults": {"model": "mlp", "preprocess": {"columns": ["age", "dose"]}},
        },
    }

    for config, file in ((separate, "own.csv"), (pooled, "b.csv"), (main, "main.csv")):
        assert f"{file}: row {gap} has no value in column 'dose'" in refused(config)


def test_evaluation_names_the_row_as_the_file_does(tmp_path: Path) -> None:
    data = save(tmp_path / "whole.csv") | {"partition": {"min_size": 5}}
    clients = {"count": 2, "defaults": {"model": "mlp", "preprocess": {"columns": ["age", "dose"]}}}
    config = {"data": data, "clients": clients, "rounds": 1}
    run = hfl.run(config, out=tmp_path / "run", overrides=QUIET)
    other = save(tmp_path / "other.csv", 6)

    check_refused(
        r"other\.csv: row 6 has no value that the model of", hfl.evaluate, run, other["path"]
    )


@each_case("labels", (False, True))
def test_proxy_file_names_its_row(labels: bool, tmp_path: Path) -> None:
    proxy = save(tmp_path / "public.csv", 6)
    if not labels:
        frame(6).drop(columns="ill").to_csv(proxy["path"], index=False)
        del proxy["label"]
    main = save(tmp_path / "main.csv") | {"proxy": {"source": proxy, "labels": labels}}
    config = {"data": main, "clients": {"count": 2, "defaults": {"model": "mlp"}}}

    assert "public.csv: row 6 has no value in column 'dose'" in refused(config)


def test_missing_value_in_memory_names_the_row_as_it_was_passed() -> None:
    gap = frame(6).drop(columns="ill")
    array = gap.to_numpy()
    arrays = [hfl.Client(name, "mlp", (array + i, Y)) for i, name in enumerate("ab", start=1)]
    whole = [hfl.Client(name, "mlp", (np.nan_to_num(array) + i, Y)) for i, name in enumerate("ab")]
    frames = [hfl.Client(name, "mlp", frame(), label="ill") for name in "ab"]
    mixed = [hfl.Client("a", "mlp", frame(6), label="ill"), whole[1]]
    test = {"test": whole[0].data}
    cases: list[tuple[Any, str]] = [
        (hfl.Federation(arrays), "clients: 'a': data: row 5 "),
        (hfl.Federation([whole[0], arrays[1]]), "clients: 'b': data: row 5 "),
        (hfl.Federation(mixed), "clients: 'a': data: row 6 "),
        (hfl.Federation([hfl.Client("a", "mlp")], data=(array, Y)), "data: row 5 "),
        (hfl.Federation(whole, test=(array, Y)), "test: row 5 "),
        (hfl.Federation(whole, **test, proxy=array), "proxy: row 5 "),
        (hfl.Federation(frames, test=frame(), label="ill", proxy=gap), "proxy: row 6 "),
    ]

    for federation, words in cases:
        error = refusal(federation.prepare, hfl.FedMD(), overrides=["data.partition.min_size=2"])
        assert words in error
        assert error.count("clients:") == 1


def test_rows_of_data_frames_count_from_1_and_those_of_arrays_from_0() -> None:
    clients = [hfl.Client(name, "mlp", frame() + i / 2, label="ill") for i, name in enumerate("ab")]
    for client in clients:
        client.data["ill"] = Y
    run = hfl.Federation(clients).train(hfl.FedAvg(), rounds=1, overrides=QUIET)
    gap = frame(6).drop(columns="ill")

    for x, words in (
        (gap, "predict: x: row 6, column 'dose': NaN or infinite value"),
        (gap.to_numpy(), "predict: x: row 5: NaN or infinite value"),
    ):
        assert refusal(run.predict, "a", x) == words
    check_refused(
        "data: row 6 has no value that the model of", hfl.evaluate, run, frame(6), label="ill"
    )


class Net(nn.Module):
    """A module for 30 columns."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(30, 4)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.body(x).relu())
        return out


@each_case("model", (Net, Net()))
def test_indicators_that_a_module_does_not_accept_are_explained(model: Any) -> None:
    x = np.random.default_rng(0).normal(size=(60, 30))
    preprocess = hfl.Preprocess(missing="indicate")
    client = hfl.Client("a", model, (x, Y), preprocess=preprocess)
    defaults = hfl.ClientSettings(preprocess=preprocess)

    for federation in (
        hfl.Federation([client], test=(x, Y)),
        hfl.Federation([hfl.Client("a", model, (x, Y))], test=(x, Y), defaults=defaults),
    ):
        check_refused("30 columns and 30 indicators", federation.prepare, hfl.FedAvg())


def test_creation_of_a_federation_with_indicators_prepares_nothing() -> None:
    x = np.random.default_rng(0).normal(size=(60, 15))
    transformed: list[Tensor] = []

    def transform(x: Tensor) -> Tensor:
        transformed.append(x)
        return x

    preprocess = hfl.Preprocess(missing="indicate", transform=transform)
    hfl.Federation([hfl.Client("a", Net(), (x, Y), preprocess=preprocess)], test=(x, Y))

    assert transformed == []


def test_missing_column_suggests_indicators(tmp_path: Path) -> None:
    frame().drop(columns="dose").to_csv(tmp_path / "own.csv", index=False)
    groups = [{"name": "a", "data": {"name": "table", "path": str(tmp_path / "own.csv")}}]
    config = {"data": save(tmp_path / "main.csv"), "clients": {"groups": [*groups, {"name": "b"}]}}

    assert "set clients.defaults.preprocess.missing=indicate" in refused(config)
    lacking = hfl.Client("a", "mlp", frame().drop(columns="dose"))
    check_refused(
        r"pass preprocess=Preprocess\(missing='indicate'\)",
        lambda: hfl.Federation([lacking], test=frame(), label="ill").prepare("local"),
    )
    whole = hfl.Client("a", "mlp", frame())
    public = frame().drop(columns=["dose", "ill"])
    check_refused(
        r"'dose' not.*Preprocess\(missing='indicate'\)",
        lambda: hfl.Federation([whole], test=frame(), label="ill", proxy=public).prepare("fedmd"),
    )


X = np.random.default_rng(0).normal(size=(40, 3))
LABELS = np.arange(40) % 2
MASK = np.zeros((40, 3), dtype=bool)
MASK[3, 1] = MASK[7, 2] = True
MASKED = np.ma.masked_array(np.where(MASK, -999.0, X), mask=MASK)
WITH_NAN = np.where(MASK, np.nan, X)
INTEGERS = np.rint(100 * X).astype(int)
WORDS = Vocabulary(tuple("abcd"))
TOKENS = np.arange(120).reshape(40, 3) % 6


class Items(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """A data set whose items are masked arrays."""

    def __len__(self) -> int:
        return len(LABELS)

    def __getitem__(self, row: int) -> tuple[Any, int]:
        return MASKED[row], int(LABELS[row])


def inputs(data: Any) -> torch.Tensor:
    view = hfl.Preprocess(missing="indicate")
    client = hfl.Client("a", "mlp", data, preprocess=view)
    found = hfl.Federation([client], test=(X[::2], LABELS[::2])).prepare("local").data
    rows = found.client_rows["a"]["train"]
    return found.preprocess("a")(rows.examples.x)


@each_case(
    "x",
    (
        MASKED,
        list(MASKED),
        MASKED.astype(np.float32),
        np.where(MASK, None, X),
        np.where(MASK, pd.NA, X.astype(object)),
    ),
)
def test_missing_entries_train_as_nan(x: Any) -> None:
    assert torch.equal(inputs((x, LABELS)), inputs((WITH_NAN, LABELS)))
    assert torch.equal(inputs(Items()), inputs((WITH_NAN, LABELS)))
    check_refused(
        r"row 3 has no value",
        lambda: hfl.Federation([hfl.Client("a", "mlp", (x, LABELS))], test=(X, LABELS)).prepare(
            "local"
        ),
    )


def test_null_values_of_frames_equal_nan() -> None:
    plain = pd.DataFrame(WITH_NAN, columns=list("abc")).assign(y=LABELS)

    def values(frame: pd.DataFrame) -> torch.Tensor:
        client = hfl.Client("a", "mlp", frame, preprocess=hfl.Preprocess(missing="indicate"))
        test = plain.dropna()
        data = hfl.Federation([client], label="y", test=test).prepare("local").data
        return data.preprocess("a")(data.client_rows["a"]["train"].examples.x)

    for dtype in ("Float64", "double[pyarrow]"):
        assert torch.equal(values(plain.astype(dict.fromkeys("abc", dtype))), values(plain))


def test_prediction_treats_masked_entries_as_missing() -> None:
    client = hfl.Client(
        "a", "mlp", (WITH_NAN, LABELS), preprocess=hfl.Preprocess(missing="indicate")
    )
    run = hfl.Federation([client], test=(X, LABELS)).train("local", rounds=1, overrides=QUIET)
    words = hfl.Client("a", "text_cnn", from_arrays(TOKENS, LABELS, vocabulary=WORDS))
    of_words = hfl.Federation([words]).train("local", rounds=1, overrides=QUIET)

    assert np.array_equal(run.predict("a", MASKED), run.predict("a", WITH_NAN))
    check_refused("expected integers", of_words.predict, "a", np.ma.masked_array(TOKENS, mask=MASK))
