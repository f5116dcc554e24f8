"""Partition functions and classes of users: arguments, columns and results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import hetero_fl as hfl
from hetero_fl.config.data import DataConfig, PartitionConfig, registered_partition_kinds
from hetero_fl.core.task import Task
from hetero_fl.data import Dataset, federate, from_arrays, partition_rows, register_partition
from hetero_fl.data.partition import PartitionContext, Partitioner, registry
from hetero_fl.utils.errors import UserError
from tests.support.federated_data import PLAIN_CLIENT
from tests.support.mistakes import check_refused, refusal

TEN = Task("multiclass", 10)


def labels(rows: int) -> torch.Tensor:
    return torch.randint(10, (rows,), generator=torch.Generator().manual_seed(0))


OWN_PARTITIONS = {
    "halves": "lambda context: [range(0, 50), range(50, 100)]",
    "three": "lambda context: [[1], [2], [3]]",
    "twice": "lambda context: [range(0, 51), range(50, 100)]",
    "outside": "lambda context: [range(0, 50), range(50, 101)]",
    "words": "lambda context: [['a'], ['b']]",
    "floats": "lambda context: [[0.5], [1.5]]",
    "short": "lambda context: [range(0, 99), []]",
    "none": "lambda context: None",
    "divides": "lambda context: 1 / 0",
    "misspelled": "lambda context: context.columns['lable']",
    "leaves": "lambda context: __import__('sys').exit(3)",
    "number": "3",
}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[torch.Tensor]]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_partition.py").write_text(
        "\n".join(f"{name} = {code}" for name, code in OWN_PARTITIONS.items())
    )

    def run(name: str) -> list[torch.Tensor]:
        return partition_rows(
            labels(100),
            None,
            PartitionConfig(kind=f"python:own_partition:{name}"),
            [1, 1],
            TEN,
            seed=0,
        )

    return run


def test_partition_can_be_a_function(own: Callable[[str], list[torch.Tensor]]) -> None:
    assert [p.tolist() for p in own("halves")] == [list(range(50)), list(range(50, 100))]
    for name, words in (
        ("three", "expected a list with the rows of each of 2 clients"),
        ("none", "expected a list with the rows of each of 2 clients"),
        ("twice", "got a row twice"),
        ("outside", "expected row indices from 0 to 99, got 0 to 100"),
        ("words", "expected row indices as integers"),
        ("floats", "expected row indices as integers, got float32"),
        ("short", "assigns only 0 rows to a client"),
        ("divides", "divides raised ZeroDivisionError: division by zero"),
        ("leaves", "leaves raised SystemExit: 3"),
        ("misspelled", "misspelled raised KeyError: no column 'lable'; did you mean 'label'?"),
        ("number", "is not a function of (context) that 'own_partition' defines or a subclass of"),
        ("halvs", "did you mean 'halves'"),
    ):
        refused = refusal(own, name)
        assert refused.startswith("data.partition.kind: ") and words in refused


def visits(rows: int = 120) -> Dataset:
    """Return a table with the metadata hospital and date, in no order."""
    rng = np.random.default_rng(0)
    days = np.datetime64("2024-01-01") + rng.permutation(rows)
    return from_arrays(
        rng.normal(size=(rows, 2)).astype("float32"),
        rng.integers(0, 2, rows),
        columns=("age", "crp"),
        metadata={"hospital": rng.choice(["north", "south"], rows), "date": days},
    )


def by_date(context: PartitionContext, column: str = "date") -> list[np.ndarray]:
    return np.array_split(np.argsort(context.columns[column]), len(context.clients))


class ByHospital(Partitioner):
    """Assign the rows of each hospital in turn."""

    def __init__(self, order: list[str]) -> None:
        self.order = order

    def partition(self, context: PartitionContext) -> list[np.ndarray]:
        return [np.flatnonzero(context.columns["hospital"] == name) for name in self.order]


def test_registered_function_sees_metadata(registering: None) -> None:
    register_partition("by_date")(by_date)
    dataset = visits()
    config = DataConfig(partition={"kind": "by_date", "min_size": 5})

    data = federate(dataset, config, dict.fromkeys(("a", "b", "c"), PLAIN_CLIENT), seed=0)

    assert data.n_train > 0
    seen = {name: rows_of_client(data, name) for name in ("a", "b", "c")}
    dates = {name: x_dates(dataset, rows) for name, rows in seen.items()}
    assert dates["a"].max() < dates["b"].min() and dates["b"].max() < dates["c"].min()


def rows_of_client(data: hfl.data.FederatedData, client: str) -> torch.Tensor:
    splits = data.client_rows[client].values()
    return torch.cat([share.examples.x[share.rows] for share in splits])


def x_dates(dataset: Dataset, x: torch.Tensor) -> np.ndarray:
    """Return the dates of rows, which are found by their inputs."""
    index = (x[:, None] == dataset.train.x[None]).all(2).to(torch.uint8).argmax(1)
    return dataset.train.metadata["date"][index.numpy()]


def test_participants_do_not_keep_metadata(registering: None) -> None:
    data = federate(visits(), DataConfig(), {"a": PLAIN_CLIENT, "b": PLAIN_CLIENT}, seed=0)
    assert all(not share.examples.metadata for _, share in data.client_rows.rows_by_location())
    assert all(not share.examples.metadata for share in data.public_sets.values())


def test_class_is_created_with_arguments(registering: None) -> None:
    register_partition("by_hospital")(ByHospital)
    dataset = visits()
    parts = {}
    for order in (["north", "south"], ["south", "north"]):
        config = {"kind": "by_hospital", "order": order}
        shares = hfl.split(dataset, 2, hfl.Partition(**config), model="mlp")
        parts[order[0]] = [len(client.data.train) for client in shares]
        assert set(shares[0].data.train.metadata["hospital"]) == {order[0]}
    assert parts["north"] == parts["south"][::-1]


def test_columns_are_read_only_and_complete(registering: None) -> None:
    seen: dict[str, Any] = {}

    @register_partition("look")
    def look(context: PartitionContext) -> list[range]:
        seen.update(context.columns)
        assert context.clients == ("client_1", "client_2")
        return [range(60), range(60, 120)]

    dataset = visits()
    hfl.split(dataset, 2, PartitionConfig(kind="look"), model="mlp")

    assert list(seen) == ["hospital", "date", "age", "crp", "label"]
    assert np.array_equal(seen["age"], dataset.train.x[:, 0].numpy())
    with pytest.raises(ValueError, match="read-only"):
        seen["age"][0] = 0


def test_patients_are_entries_with_their_columns(registering: None) -> None:
    rows = np.arange(120)
    dataset = from_arrays(
        rows[:, None].astype("float32"),
        rows % 2,
        patient=rows // 4,
        metadata={"ward": np.where(rows // 4 % 3 == 0, "A", "B")},
    )

    @register_partition("by_ward")
    def by_ward(context: PartitionContext) -> list[np.ndarray]:
        assert context.unit == "patient" and context.num_rows == 30
        return [np.flatnonzero(context.columns["ward"] == ward) for ward in "AB"]

    config = PartitionConfig(kind="by_ward", min_size=40)
    first, second = hfl.split(dataset, 2, config, model="mlp")
    assert set(first.data.train.metadata["ward"]) == {"A"} and len(first.data.train) == 40
    assert set(second.data.train.metadata["ward"]) == {"B"} and len(second.data.train) == 80
    check_refused(
        "assigns only 40 rows to a client",
        hfl.split,
        dataset,
        2,
        config.model_copy(update={"min_size": 41}),
        model="mlp",
    )


def test_registered_name_is_unique(registering: None) -> None:
    with pytest.raises(ValueError, match="register_partition: 'dirichlet' already exists"):
        register_partition("dirichlet")(by_date)
    with pytest.raises(TypeError, match="a subclass of Partitioner, got the class Dataset"):
        register_partition("by_class")(Dataset)
    register_partition("by_date")(by_date)
    with pytest.raises(ValueError, match="'by_date' already exists; choose another name"):
        register_partition("by_date")(by_date)


def test_unused_rows_are_noted(registering: None) -> None:
    register_partition("few")(lambda context: [range(30), range(30, 60)])
    notes: list[str] = []
    partition_rows(labels(100), None, PartitionConfig(kind="few"), [1, 1], TEN, seed=0, notes=notes)
    assert notes == ["data.partition.kind: few: no client gets 40 of 100 training rows"]


def divide_visits(section: dict[str, Any]) -> None:
    config = DataConfig(partition=section)
    federate(visits(), config, {"a": PLAIN_CLIENT, "b": PLAIN_CLIENT}, seed=0)


def test_mistakes_are_one_line(registering: None, subtests: pytest.Subtests) -> None:
    register_partition("by_date")(by_date)
    register_partition("by_hospital")(ByHospital)

    for section, message in (
        ({"kind": "by_dat"}, "kind: unknown value 'by_dat'; did you mean 'by_date'?"),
        ({"kind": "iid", "column": "date"}, "column: unknown key"),
        ({"kind": "iid", "arguments": {"column": 1}}, "arguments: does not apply to kind=iid"),
        (
            {"kind": "by_date", "colum": "date"},
            "data.partition.colum: unknown argument of by_date; did you mean 'column'?",
        ),
        ({"kind": "by_date", "context": 1}, "data.partition.context: unknown argument"),
        (
            {"kind": "by_date", "column": "dat"},
            "by_date raised KeyError: no column 'dat'; did you mean 'date'?",
        ),
        ({"kind": "by_hospital"}, "data.partition.order: missing; by_hospital needs this argument"),
        ({"kind": "by_hospital", "order": 3}, "by_hospital raised TypeError: "),
    ):
        with subtests.test(message=message):
            assert message in refusal(divide_visits, section)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-5, 130)
        | st.integers()
        | st.floats()
        | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner),
        max_leaves=8,
    )
)
def test_any_result_is_a_partition_or_one_line(result: Any) -> None:
    patch = pytest.MonkeyPatch()
    patch.setitem(registry._partitions, "strange", lambda context: result)
    registered_partition_kinds.add("strange")
    try:
        config = PartitionConfig(kind="strange", min_size=1)
        parts = partition_rows(labels(100), None, config, [1, 1], TEN, seed=0)
    except UserError as error:
        assert str(error).startswith("data.partition.kind: strange") and "\n" not in str(error)
    else:
        assert len(torch.cat(parts).unique()) == len(torch.cat(parts)) and len(parts) == 2
    finally:
        patch.undo()
        registered_partition_kinds.discard("strange")
