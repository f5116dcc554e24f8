"""Rows of a patient stay together, and dated rows are divided by date."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import assume, given, settings, strategies as st

from hetero_fl.config.clients import ClientSettings, PreprocessConfig
from hetero_fl.config.data import (
    DataConfig,
    PartitionConfig,
    ProxyConfig,
    SourceConfig,
    SplitConfig,
)
from hetero_fl.core.metrics import score
from hetero_fl.core.task import Task
from hetero_fl.data import (
    Dataset,
    FederatedData,
    federate,
    from_arrays,
    load_source,
    with_test,
)
from hetero_fl.data.partition.units import most_common_stratum
from hetero_fl.data.splits import hold_out
from hetero_fl.utils.errors import UserError
from tests.support.federated_data import PLAIN, PLAIN_CLIENT, THREE, numbered, rows_of
from tests.support.mistakes import check_refused

THREE_CLASSES = Task("multiclass", 3)
PATIENTS = st.lists(st.integers(1, 9), min_size=30, max_size=60)  # rows of each


def patients_of(sizes: list[int], seed: int) -> torch.Tensor:
    """Return the patient of each row, shuffled."""
    patient = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return patient[torch.randperm(len(patient), generator=torch.Generator().manual_seed(seed))]


def places_of(data: FederatedData) -> list[list[int]]:
    """Return the indices of training rows by location."""
    places = [rows_of(data, c, s) for c in data.client_ids for s in ("train", "validation", "test")]
    return [
        *places,
        rows_of(data, "", "common_validation"),
        *([rows_of(data, "", "proxy")] if data.n_proxy else []),
    ]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    sizes=PATIENTS,
    kind=st.sampled_from(["iid", "dirichlet", "quantity", "classes"]),
    clients=st.integers(1, 4),
    proxy=st.integers(0, 20),
    limit=st.sampled_from([None, 90]),
    carved=st.booleans(),
    seed=st.integers(0, 999),
)
def test_patients_are_in_exactly_one_location(
    sizes: list[int],
    kind: str,
    clients: int,
    proxy: int,
    limit: int | None,
    carved: bool,
    seed: int,
) -> None:
    patient = patients_of(sizes, seed)
    assume(len(patient) >= 100)
    dataset = numbered(len(patient), patient=patient)
    dataset = replace(dataset, test=None) if carved else dataset
    config = DataConfig(
        train_limit=limit,
        proxy=ProxyConfig(size=proxy),
        partition=PartitionConfig(kind=kind, classes=3, min_size=4, alpha=1.0),
        split=SplitConfig(validation=0.2, test=0.2),
    )
    try:
        data = federate(dataset, config, {f"c{i}": PLAIN_CLIENT for i in range(clients)}, seed)
    except UserError as error:  # a client may get so few patients that they cannot be split
        assert str(error).startswith(("data.patient: client", "data.partition."))
        return
    places = places_of(data)
    if carved:
        places.append(rows_of(data, "", "common_test"))
    every = sorted(row for place in places for row in place)
    assert len(every) == len(set(every)) and all(place for place in places)
    if limit is None:
        assert len(every) == len(patient)
    patient_sets = [set(patient[place].tolist()) for place in places]
    assert sum(map(len, patient_sets)) == len(set().union(*patient_sets))
    assert data.n_proxy <= max(proxy, *sizes) and (data.n_proxy > 0) == (proxy > 0)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(1, 12), min_size=2, max_size=30),
    st.integers(0, 200),
    st.integers(0, 1),
    st.integers(0, 99),
)
def test_draw_patients_does_not_split_patients(
    sizes: list[int], count: int, leave: int, seed: int
) -> None:
    patient = patients_of(sizes, seed)
    generator = torch.Generator().manual_seed(seed)
    drawn, rest = hold_out(
        torch.arange(len(patient)), count, generator, patient=patient, leave=leave
    )
    taken, left = set(patient[drawn].tolist()), set(patient[rest].tolist())
    assert sorted([*drawn.tolist(), *rest.tolist()]) == list(range(len(patient)))
    assert not taken & left and len(left) >= leave and bool(taken) == (count > 0)
    assert len(drawn) <= max(count, min(sizes))
    # no remaining patient would have fitted
    if leave < len(left) and taken and count >= min(sizes):
        assert min(sizes[p] for p in left) > count - len(drawn)


def test_patient_stratum_is_the_most_frequent_label() -> None:
    strata = torch.tensor([2, 0, 2, 1, 1, 0, 4])
    # the lowest of equally frequent strata
    assert most_common_stratum(strata, torch.tensor([0, 0, 0, 1, 2, 2, 3])).tolist() == [2, 1, 0, 4]


def test_patient_with_rows_in_two_groups_is_refused() -> None:
    # rows 66 and 67 are of two groups, but not of one patient
    groups = ["a"] * 67 + ["b"] * 66 + ["c"] * 67
    natural = DataConfig(partition=PartitionConfig(kind="natural"))
    federate(numbered(groups=groups, patient=(torch.arange(200) + 1) // 2), natural, THREE, 0)
    limited = natural.model_copy(update={"train_limit": 60})
    # whether the draws leave the two rows to be dealt out, or not
    for row, seed in itertools.product((66, 132), range(3)):
        patients = [-1 if i in (row, row + 1) else i for i in range(200)]
        check_refused(
            "patient '-1' has rows in groups",
            federate,
            numbered(groups=groups, patient=patients),
            limited,
            THREE,
            seed,
        )


def table(path: Path, patient: str | None = None, **columns: Any) -> Dataset:
    frame = pd.DataFrame({"a": range(8), "b": [0.5] * 8, "ill": [0, 1] * 4}).assign(**columns)
    frame.to_csv(path, index=False)
    return load_source(
        SourceConfig(name="table", path=str(path), label="ill", patient=patient), path.parent
    )


def test_patient_column_of_tables(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    found = table(path, "who", who=["p10", "p2", " p2", "p1"] * 2)
    assert found.train.patient is not None and found.train.patient.tolist() == [2, 1, 1, 0] * 2
    assert found.train.patient_names == ("p1", "p2", "p10") and found.columns == ("a", "b")
    for patient, who, message in (
        ("wo", range(8), r"data\.patient: column 'wo' not found in .*; did you mean 'who'"),
        ("ill", range(8), r"data\.patient: must differ from label, got 'ill'"),
        ("who", ["x", None] * 4, "row 2, column 'who': missing value"),
    ):
        check_refused(message, table, path, patient, who=who)


def test_possible_patient_column_is_noted(tmp_path: Path) -> None:
    def warned(patient: str | None = None, **columns: Any) -> list[str]:
        notes = table(tmp_path / "t.csv", patient, **columns).notes
        return [note for note in notes if "data.patient" in note]

    for name in ("patient_id", "SubjectNo", "person", "MRN"):
        assert "the column is a feature" in warned(**{name: [1, 2, 3, 4] * 2})[0]
        assert f"column '{name}'" in warned(**{name: ["a", "b", "c", "d"] * 2})[0]
        assert not warned(**{name: range(8)})  # a row a patient
        assert not warned(**{name: [0, 1] * 4})  # a mark
        assert not warned(**{name: [0.5, 1, 2.5, 3] * 2})  # a measurement
        assert not warned(name, **{name: [1, 2, 3, 4] * 2})
    assert not warned(number=[1, 2, 3, 4] * 2)


def test_patient_array_of_npz(npz: Any, tmp_path: Path) -> None:
    who = [f"p{i // 3}" for i in range(30)]

    def load(path: Path, name: str = "npz", patient: str | None = None) -> Dataset:
        return load_source(SourceConfig(name=name, path=str(path), patient=patient), tmp_path)

    for name, file, key in (
        ("npz", npz(patient=who), None),
        ("chest_xray", npz("b.npz", who=who), "who"),
    ):
        found = load(file, name, key).train
        assert found.patient is not None and found.patient.tolist() == [i // 3 for i in range(30)]
    assert load(npz()).train.patient is None
    check_refused(
        r"data\.path: .*b\.npz: array 'wo' not found; the file has .*, who$",
        load,
        npz("b.npz", who=who),
        "npz",
        "wo",
    )
    check_refused(
        r"patient: expected 30 rows as in train_images, got 4",
        load,
        npz(patient=who[:4]),
    )


NATURAL = PartitionConfig(kind="natural", min_size=2)


def dated(
    rows: int = 200, groups: list[str] | None = None, shuffled: bool = False, **other: object
) -> Dataset:
    """Return a data set whose inputs and targets are the times of the rows."""
    time = torch.arange(rows)
    time = (
        time[torch.randperm(rows, generator=torch.Generator().manual_seed(0))] if shuffled else time
    )
    return from_arrays(time[:, None].float(), time.float(), time=time, group=groups, **other)


def federated(
    dataset: Dataset, clients: dict[str, ClientSettings] | None = None, **config: object
) -> FederatedData:
    return federate(dataset, DataConfig(**config), clients or THREE, 0)


def test_cut_leaves_no_target_on_both_sides() -> None:
    generator = torch.Generator()
    rows = torch.arange(101)
    later, before = hold_out(rows, 0.2, generator, time=rows)
    assert later.tolist() == list(range(81, 101)) and len(before) == 81
    later, before = hold_out(rows, 0.2, generator, time=rows, span=5)
    assert later.tolist() == list(range(86, 101)) and len(before) == 81
    same = torch.tensor([3, 3, 3, 9, 9])
    later, before = hold_out(torch.arange(5), 0.5, generator, time=same)
    assert later.tolist() == [3, 4] and before.tolist() == [0, 1, 2]


def test_default_test_set_is_the_last_fifth_in_time() -> None:
    full = with_test(dated(shuffled=True))
    assert full.test is not None and full.test.time is not None and full.train.time is not None
    assert int(full.train.time.max()) < int(full.test.time.min())
    assert len(full.test) == 40 and len(full.train) == 160


@pytest.mark.parametrize("kind", ["iid", "dirichlet"])
def test_every_client_is_cut_by_date(kind: str) -> None:
    data = federated(dated(shuffled=True), partition=PartitionConfig(kind=kind, min_size=5))
    for client in data.client_ids:
        train, validation, test = (
            rows_of(data, client, name) for name in ("train", "validation", "test")
        )
        assert max(train) < min(validation) <= max(validation) < min(test)
    assert max(rows_of(data, "a", "train")) < min(rows_of(data, "", "common_validation"))
    assert max(rows_of(data, "", "common_validation")) < min(rows_of(data, "", "common_test"))


def test_natural_partition_uses_the_common_cuts() -> None:
    groups = [("b", "a", "c")[i % 3] for i in range(200)]
    data = federated(dated(groups=groups), partition=NATURAL)
    for place, client in enumerate("bac"):
        for split in ("train", "validation", "test"):
            assert {row % 3 for row in rows_of(data, client, split)} == {place}
    for split in ("validation", "test"):
        own = sorted(row for client in "abc" for row in rows_of(data, client, split))
        assert own == sorted(rows_of(data, "", f"common_{split}"))
    limited = federated(dated(groups=groups), partition=NATURAL, test_limit=5)
    assert limited.n_test == 5 and rows_of(limited, "a", "test") == rows_of(data, "a", "test")


def test_dates_and_units_belong_to_the_data() -> None:
    days = np.datetime64("2024-03-01") + np.arange(10).astype("timedelta64[D]")
    dataset = from_arrays(torch.zeros(10, 1), torch.zeros(10), time=days)
    one, other = dated(unit=torch.ones(200)), dated(unit=torch.full((200,), 2.0))

    assert dataset.train.time is not None and dataset.train.time.diff().tolist() == [86400] * 9
    assert federated(one).content_hash() != federated(other).content_hash()


def test_metrics_are_in_the_unit_of_the_target() -> None:
    task = Task("regression", 1)
    predictions, y, unit = (
        torch.tensor([[1.0], [2.0]]),
        torch.tensor([[2.0], [4.0]]),
        torch.tensor([10.0, 100.0]),
    )
    found, plain = score(task, predictions, y, unit), score(task, predictions, y)
    assert found["mae"] == (10 + 200) / 2 and plain["mae"] == 1.5
    assert found["rmse"] == pytest.approx(((100 + 40000) / 2) ** 0.5)
    assert found["r2"] == pytest.approx(1 - (100 + 40000) / (2 * 190**2))
    assert (
        score(Task("multiclass", 2), torch.zeros(2, 2), torch.tensor([0, 1]), unit)["accuracy"]
        == 0.5
    )


def test_extra_columns_follow_their_rows() -> None:
    dataset = dated(groups=["a", "b"] * 100)
    dataset.train = replace(
        dataset.train, unit=dataset.train.x[:, 0] + 1, baselines={"same": dataset.train.x.clone()}
    )
    data = federated(
        dataset, dict.fromkeys("ab", PLAIN_CLIENT), partition=NATURAL, proxy=ProxyConfig(size=20)
    )
    for owner, name in (("a", "test"), ("b", "validation"), ("", "common_test")):
        rows, extra = torch.tensor(rows_of(data, owner, name)), data.extra_columns(owner, name)
        assert extra.time is not None and extra.unit is not None
        assert torch.equal(extra.time, rows) and torch.equal(extra.unit, rows + 1.0)
        assert torch.equal(extra.baselines["same"][:, 0], rows.float())
        assert set(data.columns(owner or "a", name, PLAIN)) == {
            "x",
            "y",
        }  # extra columns are no inputs


Written = Callable[[str, str], str]


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Written:
    """Write a module with a source `made`; return its name in configurations."""
    monkeypatch.syspath_prepend(str(tmp_path))
    head = (
        "import torch\nfrom dataclasses import replace\nfrom "
        "hetero_fl.data import from_arrays, with_test\n"
    )

    def write(module: str, result: str) -> str:
        (tmp_path / f"{module}.py").write_text(head + result)
        return f"python:{module}:made"

    return write


def test_client_source_keeps_its_cuts(written: Written) -> None:
    own = written(
        "own_dated",
        "def made(config, root):\n"
        "    t = torch.arange(1000, 1100)\n"
        "    whole = with_test(from_arrays(t[:, None].float(), t.float(), time=t))\n"
        "    rows = torch.arange(80)\n"
        "    return replace(whole, "
        "train=whole.train.select_rows(rows[:60]), "
        "validation=whole.train.select_rows(rows[60:]))\n",
    )
    clients = {"a": PLAIN_CLIENT, "b": ClientSettings(data=SourceConfig(name=own))}
    data = federated(dated(), clients)
    assert rows_of(data, "b", "train") == list(range(1000, 1060))
    assert rows_of(data, "b", "validation") == list(range(1060, 1080))
    assert rows_of(data, "b", "test") == list(range(1080, 1100))


def test_client_source_is_cut_by_its_target_span(written: Written) -> None:
    """Cut by targets that reach three hours ahead, unlike those of the common set."""
    own = written(
        "own_span",
        "def made(config, root):\n"
        "    t = torch.arange(1000, 1100)\n"
        "    return replace(from_arrays(t[:, None].float(), t.float(), time=t), span=3)\n",
    )
    clients = {"a": PLAIN_CLIENT, "b": ClientSettings(data=SourceConfig(name=own))}

    data = federated(dated(), clients)

    train, validation, test = (rows_of(data, "b", name) for name in ("train", "validation", "test"))
    assert max(train) + 3 < min(validation) and max(validation) + 3 < min(test)


def test_client_source_may_lack_unused_columns(written: Written) -> None:
    own = written(
        "own_columns",
        "def made(config, root):\n"
        "    x = torch.arange(60.0)[:, None]\n"
        "    parts = [(x[a:b], x[a:b, 0]) for a, b in ((0, 40), (40, 50), (50, 60))]\n"
        "    whole = from_arrays(*parts[0], validation=parts[1], test=parts[2], columns=['hour'])\n"
        "    for part, a in ((whole.train, 0), (whole.validation, 40), (whole.test, 50)):\n"
        "        part.time = torch.arange(a, a + len(part))\n"
        "    return whole\n",
    )
    time = torch.arange(200)
    common = from_arrays(
        torch.stack([time, time], 1).float(), time.float(), time=time, columns=["hour", "load"]
    )
    sees = PreprocessConfig(columns=["hour"])
    data = federated(
        common,
        {"a": PLAIN_CLIENT, "b": ClientSettings(data=SourceConfig(name=own), preprocess=sees)},
    )
    for split, first in (("validation", 40), ("test", 50)):
        assert data.columns("b", split, PLAIN)["y"].flatten().tolist() == list(
            range(first, first + 10)
        )
