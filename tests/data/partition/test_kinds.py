"""Kinds of partition, and functions and classes of users: settings, columns and results."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import hetero_fl as hfl
from hetero_fl.config.data import DataConfig, PartitionConfig
from hetero_fl.core.task import Task
from hetero_fl.data import (
    Dataset,
    Partitioner,
    Units,
    federate,
    from_arrays,
    partition_rows,
    register_partition,
    row_strata,
)
from hetero_fl.data.partition import apportion
from hetero_fl.utils.errors import UserError
from tests.support.federated_data import PLAIN_CLIENT
from tests.support.mistakes import check_refused, refusal

Parts = list[torch.Tensor]


def labels(rows: int, classes: int = 10, seed: int = 0) -> torch.Tensor:
    return torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(seed))


def divide(
    y: torch.Tensor, clients: int | list[float], kind: str, seed: int = 0, **section: Any
) -> Parts:
    """Divide rows among clients of given sizes, or a number of clients of equal sizes."""
    config = PartitionConfig.model_validate({"kind": kind, **section})
    sizes = [1.0] * clients if isinstance(clients, int) else clients
    return partition_rows(y, None, config, sizes, Task("multiclass", int(y.max()) + 1), seed=seed)


def counts(parts: Parts, y: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.bincount(y[p], minlength=int(y.max()) + 1) for p in parts])


def check_cover(parts: Parts, rows: int, min_size: int = 1) -> None:
    """Check that each row goes to one client, and that clients have enough rows."""
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(rows))
    assert min(map(len, parts)) >= min_size


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(["iid", "in_order", "dirichlet", "classes", "quantity"]),
    sizes=st.lists(st.floats(0.05, 20), min_size=1, max_size=12),
    rows=st.integers(60, 400),
    min_size=st.integers(1, 5),
    alpha=st.floats(0.01, 50),
    each=st.integers(1, 3),
    seed=st.integers(0, 10**6),
)
def test_every_row_goes_to_exactly_one_client(
    kind: str, sizes: list[float], rows: int, min_size: int, alpha: float, each: int, seed: int
) -> None:
    y = labels(rows, classes=3, seed=seed)
    section = {"alpha": alpha, "classes": each, "min_size": min_size}
    try:
        parts = divide(y, sizes, kind, seed, **section)
    except UserError as error:
        # A client of very small size may get too few rows of its classes.
        assert kind == "classes" and "min_size" in str(error)
        return
    if kind != "classes" or len(sizes) * each >= 3:
        check_cover(parts, rows, min_size)
    assert len(torch.cat(parts).unique()) == len(torch.cat(parts))
    assert all(torch.equal(p, p.sort().values) and p.dtype == torch.int64 for p in parts)
    if kind == "classes":
        assert ((counts(parts, y) > 0).sum(1) <= each).all()
    expected = np.array(sizes) / sum(sizes) * rows
    if kind == "iid" and expected.min() >= min_size:
        assert all(abs(len(p) - e) < 1 for p, e in zip(parts, expected, strict=True))
    again = divide(y, sizes, kind, seed, **section)
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 500), st.lists(st.floats(0.01, 9), min_size=1, max_size=9), st.integers(0, 9))
def test_apportion_rounds_to_the_total(total: int, share: list[float], at_least: int) -> None:
    at_least = min(at_least, total // len(share))
    exact = np.array(share) / sum(share) * total
    found = apportion(total, np.array(share), at_least)
    assert found.sum() == total and found.min() >= at_least
    assert exact.min() < at_least or (abs(found - exact) < 1).all()


def test_dirichlet_follows_its_definition() -> None:
    """Check the variance of class proportions, (1/K)(1 - 1/K) / (K·alpha + 1)."""
    y = torch.arange(100_000) % 100
    clients = 5
    alpha = 0.7

    proportions = counts(divide(y, clients, "dirichlet", alpha=alpha, min_size=1), y) / 1000
    sized = divide(y, [1, 1, 1, 1, 4], "dirichlet", alpha=alpha)

    expected = (1 / clients) * (1 - 1 / clients) / (clients * alpha + 1)
    assert proportions.var(correction=0).item() == pytest.approx(expected, rel=0.15)
    assert len(sized[4]) / len(y) == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("cap", [None, 1.0])
@pytest.mark.parametrize(
    ("rows", "classes", "min_size"), [(20_000, 10, 20), (3_000, 1000, 2), (1000, 2, 1)]
)
def test_dirichlet_among_a_thousand_clients_takes_seconds(
    rows: int, classes: int, min_size: int, cap: float | None
) -> None:
    y = torch.arange(rows) % classes
    # Unlike the time of a clock, independent of other processes.
    start = time.process_time()

    parts = divide(y, 1000, "dirichlet", alpha=0.01, min_size=min_size, cap=cap)

    assert time.process_time() - start < 30
    check_cover(parts, rows, min_size)


def test_note_counts_moved_rows_and_clients() -> None:
    """Nearly all rows of a class go to one client, so that the others get their minimum."""
    y = torch.zeros(100, dtype=torch.int64)
    config = PartitionConfig(kind="dirichlet", alpha=1e-6, min_size=5)
    notes: list[str] = []

    parts = partition_rows(y, None, config, [1] * 4, Task("multiclass", 2), seed=0, notes=notes)

    assert sorted(map(len, parts)) == [5, 5, 5, 85]
    assert notes == ["data.partition.min_size: moved 15 rows to 3 clients that had fewer than 5"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("kind", "section"),
    [
        *(("dirichlet", {"alpha": alpha, "min_size": 20}) for alpha in (1e-300, 1e-6, 1e-3)),
        *((kind, {"alpha": 1e308}) for kind in ("dirichlet", "quantity")),
        ("dirichlet", {"alpha": 0.5, "cap": 1e308, "min_size": 1}),
    ],
)
def test_extreme_settings_do_not_overflow(kind: str, section: Mapping[str, Any]) -> None:
    parts = divide(torch.arange(400) % 4, 10, kind, **section)

    check_cover(parts, 400, section.get("min_size", 20))
    assert section["alpha"] < 1e308 or {len(part) for part in parts} == {40}


def test_classes_are_assigned_evenly_and_shared_by_size() -> None:
    y = torch.arange(2000) % 10

    parts = divide(y, 10, "classes", classes=2)
    few = divide(y, 3, "classes", classes=2)

    has_class = counts(parts, y) > 0
    assert (has_class.sum(1) == 2).all() and (has_class.sum(0) == 2).all()
    assert [len(part) for part in parts] == [200] * 10
    assert [len(part) for part in divide(y, [1, 3], "classes", classes=10)] == [500, 1500]
    # Six classes have a client.
    assert (counts(few, y) > 0).sum().item() == 6 and [len(part) for part in few] == [400] * 3


def test_strata_of_multilabel_and_regression() -> None:
    # The rarest label is 2, then 1, then 0.
    y = torch.tensor([[1.0, 1, 0], [1, 0, 0], [0, 0, 0], [1, 0, 1], [1, 1, 0]])
    tenths = row_strata(torch.randperm(1000)[:, None].float(), Task("regression", 1))

    assert row_strata(y, Task("multilabel", 3)).tolist() == [2, 1, 0, 3, 2]
    assert torch.bincount(tenths).tolist() == [100] * 10
    assert row_strata(torch.zeros(5, 1), Task("regression", 1)).unique().numel() == 1
    for task, targets in (
        (Task("multilabel", 3), y.repeat(50, 1)),
        (Task("regression", 1), torch.randn(200, 1)),
    ):
        config = PartitionConfig(kind="dirichlet")
        check_cover(partition_rows(targets, None, config, [1] * 4, task, seed=0), len(targets), 20)


OWN_PARTITIONS = {
    "three": ("lambda units: [[1], [2], [3]]", "expected a list with the rows of each of 2"),
    "none": ("lambda units: None", "expected a list with the rows of each of 2 clients"),
    "twice": ("lambda units: [range(0, 51), range(50, 100)]", "got a row twice"),
    "outside": (
        "lambda units: [range(0, 50), range(50, 101)]",
        "expected row indices from 0 to 99, got 0 to 100",
    ),
    "words": ("lambda units: [['a'], ['b']]", "expected row indices as integers"),
    "floats": ("lambda units: [[0.5], [1.5]]", "expected row indices as integers, got float32"),
    "short": ("lambda units: [range(0, 99), []]", "assigns only 0 rows to a client, got 20"),
    "divides": ("lambda units: 1 / 0", "divides raised ZeroDivisionError: division by zero"),
    "misspelled": (
        "lambda units: units.columns['lable']",
        "misspelled raised KeyError: no column 'lable'; did you mean 'label'?",
    ),
    "leaves": ("lambda units: __import__('sys').exit(3)", "leaves raised SystemExit: 3"),
    "number": ("3", "is not a function of (units) that 'own_partition' defines or a subclass of"),
    "halvs": ("None", "did you mean 'halves'"),
}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Parts]:
    monkeypatch.chdir(tmp_path)
    code = {name: code for name, (code, _) in OWN_PARTITIONS.items() if name != "halvs"}
    code["halves"] = "lambda units: [range(0, 50), range(50, 100)]"
    lines = [f"{name} = {each}" for name, each in code.items()]
    (tmp_path / "own_partition.py").write_text("\n".join(lines))
    return lambda name: divide(labels(100), 2, f"python:own_partition:{name}")


def test_partition_can_be_a_function(own: Callable[[str], Parts]) -> None:
    assert [p.tolist() for p in own("halves")] == [list(range(50)), list(range(50, 100))]
    for name, (_, words) in OWN_PARTITIONS.items():
        refused = refusal(own, name)
        assert refused.startswith("data.partition.") and words in refused


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


def by_date(units: Units, column: str = "date") -> list[np.ndarray]:
    return np.array_split(np.argsort(units.columns[column]), len(units.clients))


class ByHospital(Partitioner):
    """Assign the rows of each hospital in turn."""

    order: list[str]

    def assign(self, units: Units) -> list[np.ndarray]:
        """Return the rows of each hospital."""
        return [np.flatnonzero(units.columns["hospital"] == name) for name in self.order]


def test_registered_function_sees_metadata(registering: None) -> None:
    register_partition("by_date")(by_date)

    shares = hfl.split(visits(), 3, hfl.Partition(kind="by_date", min_size=5), model="mlp")

    dates = [client.data.train.metadata["date"] for client in shares]
    assert dates[0].max() < dates[1].min() and dates[1].max() < dates[2].min()


def test_participants_do_not_keep_metadata() -> None:
    data = federate(visits(), DataConfig(), {"a": PLAIN_CLIENT, "b": PLAIN_CLIENT}, seed=0)
    assert all(not share.examples.metadata for _, share in data.client_rows.rows_by_location())
    assert all(not share.examples.metadata for share in data.public_sets.values())


def test_class_has_settings(registering: None) -> None:
    register_partition("by_hospital")(ByHospital)
    for order in (["north", "south"], ["south", "north"]):
        partition = hfl.Partition(kind="by_hospital", order=order)
        shares = hfl.split(visits(), 2, partition, model="mlp")
        assert [{*client.data.train.metadata["hospital"]} for client in shares] == [
            {order[0]},
            {order[1]},
        ]


def test_columns_are_complete(registering: None) -> None:
    seen: dict[str, Any] = {}

    @register_partition("look")
    def look(units: Units) -> list[range]:
        seen.update(units.columns)
        assert units.clients == ("client_1", "client_2")
        return [range(60), range(60, 120)]

    dataset = visits()
    hfl.split(dataset, 2, PartitionConfig(kind="look"), model="mlp")

    assert list(seen) == ["hospital", "date", "age", "crp", "label"]
    assert np.array_equal(seen["age"], dataset.train.x[:, 0].numpy())


def test_patients_are_units_with_their_columns(registering: None) -> None:
    rows = np.arange(120)
    ward = np.where(rows // 4 % 3 == 0, "A", "B")
    x = rows[:, None].astype("float32")
    dataset = from_arrays(x, rows % 2, patient=rows // 4, metadata={"ward": ward})

    @register_partition("by_ward")
    def by_ward(units: Units) -> list[np.ndarray]:
        assert units.noun == "patient" and len(units) == 30
        return [np.flatnonzero(units.columns["ward"] == ward) for ward in "AB"]

    config = PartitionConfig(kind="by_ward", min_size=40)
    for client, name, size in zip(
        hfl.split(dataset, 2, config, model="mlp"), "AB", (40, 80), strict=True
    ):
        assert set(client.data.train.metadata["ward"]) == {name} and len(client.data.train) == size
    more = config.model_copy(update={"min_size": 41})
    check_refused("assigns only 40 rows to a client", hfl.split, dataset, 2, more, model="mlp")


def test_registered_name_is_not_built_in(registering: None) -> None:
    with pytest.raises(ValueError, match="'dirichlet' is a built-in partition"):
        register_partition("dirichlet")(by_date)
    with pytest.raises(TypeError, match=r"or a subclass of .*Partitioner, got .*Dataset"):
        register_partition("by_class")(Dataset)


def test_unused_rows_are_noted(registering: None) -> None:
    register_partition("few")(lambda units: [range(30), range(30, 60)])
    config = PartitionConfig(kind="few")
    notes: list[str] = []
    partition_rows(labels(100), None, config, [1, 1], Task("multiclass", 10), seed=0, notes=notes)
    assert notes == ["data.partition.kind: few: no client gets 40 of 100 training rows"]


def test_mistakes_are_one_line(registering: None, subtests: pytest.Subtests) -> None:
    register_partition("by_date")(by_date)
    register_partition("by_hospital")(ByHospital)

    def divide_visits(section: dict[str, Any]) -> None:
        config = DataConfig(partition=section)
        federate(visits(), config, {"a": PLAIN_CLIENT, "b": PLAIN_CLIENT}, seed=0)

    for section, message in (
        ({"kind": "by_dat"}, "kind: unknown value 'by_dat'; did you mean 'by_date'?"),
        ({"kind": "iid", "column": "date"}, "column: unknown key"),
        ({"kind": "iid", "arguments": {"column": 1}}, "arguments: does not apply to kind=iid"),
        (
            {"kind": "by_date", "colum": "date"},
            "data.partition.colum: unknown key; did you mean 'column'?",
        ),
        ({"kind": "by_date", "units": 1}, "data.partition.units: unknown key"),
        ({"kind": "by_date", "column": "dat"}, "no column 'dat'; did you mean 'date'?"),
        ({"kind": "by_hospital"}, "data.partition.order: missing (kind=by_hospital)"),
        ({"kind": "by_hospital", "order": 3}, "data.partition.order: expected a list, got 3"),
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
    register_partition("strange")(lambda units: result)
    try:
        parts = divide(labels(100), 2, "strange", min_size=1)
    except UserError as error:
        assert str(error).startswith("data.partition.") and "\n" not in str(error)
    else:
        assert len(torch.cat(parts).unique()) == len(torch.cat(parts)) and len(parts) == 2
