"""Kinds of partition, and functions and classes of users: arguments, columns and results."""

from __future__ import annotations

import time
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
from hetero_fl.data import (
    Dataset,
    federate,
    from_arrays,
    partition_rows,
    register_partition,
    row_strata,
)
from hetero_fl.data.partition import PartitionContext, Partitioner, apportion, cut_below, registry
from hetero_fl.utils.errors import UserError
from tests.support.federated_data import PLAIN_CLIENT
from tests.support.mistakes import check_refused, refusal

TEN = Task("multiclass", 10)


def labels(rows: int, classes: int = 10, seed: int = 0) -> torch.Tensor:
    return torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(seed))


def counts(parts: list[torch.Tensor], y: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.bincount(y[p], minlength=int(y.max()) + 1) for p in parts])


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
    config = PartitionConfig(kind=kind, alpha=alpha, classes=each, min_size=min_size)
    try:
        parts = partition_rows(y, None, config, sizes, Task("multiclass", 3), seed=seed)
    except (
        UserError
    ) as error:  # few rows of a class for one of very small size: there may be no such deal
        assert kind == "classes" and "min_size" in str(error)
        return
    assert len(parts) == len(sizes)
    assert all(len(p) >= min_size for p in parts)
    assert all(torch.equal(p, p.sort().values) and p.dtype == torch.int64 for p in parts)
    every = torch.cat(parts).sort().values
    if kind != "classes" or len(sizes) * each >= 3:
        assert torch.equal(every, torch.arange(rows))
    else:
        assert len(every.unique()) == len(every)
    if kind == "classes":
        assert ((counts(parts, y) > 0).sum(1) <= each).all()
    if kind == "iid":
        expected = np.array(sizes) / sum(sizes) * rows
        if expected.min() >= min_size:
            assert all(abs(len(p) - e) < 1 for p, e in zip(parts, expected, strict=True))
    again = partition_rows(y, None, config, sizes, Task("multiclass", 3), seed=seed)
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 500), st.lists(st.floats(0.01, 9), min_size=1, max_size=9), st.integers(0, 9))
def test_apportion_rounds_to_the_total(total: int, share: list[float], at_least: int) -> None:
    at_least = min(at_least, total // len(share))
    exact = np.array(share) / sum(share) * total
    found = apportion(total, np.array(share), at_least)
    assert found.sum() == total and found.min() >= at_least
    if exact.min() >= at_least:
        assert (abs(found - exact) < 1).all()


def test_apportion_gives_the_rest_to_the_largest_remainders() -> None:
    assert apportion(10, np.array([0.32, 0.25, 0.43])).tolist() == [3, 3, 4]
    assert apportion(5, np.array([1.0, 1.0, 1.0])).tolist() == [2, 2, 1]


def test_dirichlet_skew_follows_alpha() -> None:
    y = labels(20_000)
    for alpha, low, high in ((0.1, 0.55, 1.0), (1.0, 0.22, 0.4), (100.0, 0.1, 0.16)):
        found = []
        for seed in range(3):
            parts = partition_rows(
                y, None, PartitionConfig(kind="dirichlet", alpha=alpha), [1] * 10, TEN, seed=seed
            )
            share = counts(parts, y).double() / torch.tensor([len(p) for p in parts])[:, None]
            found.append(share.max(1).values.mean())  # share of the most frequent class
        assert low < sum(found) / 3 < high


def test_dirichlet_follows_its_definition() -> None:
    """Check the variance of class proportions, (1/K)(1 - 1/K) / (K·alpha + 1)."""
    y, clients, alpha = torch.arange(100_000) % 100, 5, 0.7
    parts = partition_rows(
        y,
        None,
        PartitionConfig(kind="dirichlet", alpha=alpha, min_size=1),
        [1] * clients,
        Task("multiclass", 100),
        seed=0,
    )
    proportions = counts(parts, y).double() / 1000
    expected = (1 / clients) * (1 - 1 / clients) / (clients * alpha + 1)
    assert proportions.var(correction=0).item() == pytest.approx(expected, rel=0.15)
    sized = partition_rows(
        y,
        None,
        PartitionConfig(kind="dirichlet", alpha=alpha),
        [1, 1, 1, 1, 4],
        Task("multiclass", 100),
        seed=0,
    )
    assert len(sized[4]) / len(y) == pytest.approx(0.5, abs=0.06)


def test_dirichlet_among_a_thousand_clients_takes_seconds(subtests: pytest.Subtests) -> None:
    for rows, classes, clients, min_size in (
        (20_000, 10, 1000, 20),
        (20_000, 10, 1000, 1),
        (3_000, 1000, 1000, 2),
        (1000, 2, 1000, 1),
    ):
        for cap in (None, 1.0):
            with subtests.test(rows=rows, classes=classes):
                y = torch.arange(rows) % classes
                config = PartitionConfig(kind="dirichlet", alpha=0.01, min_size=min_size, cap=cap)
                notes: list[str] = []
                start = (
                    time.process_time()
                )  # unlike the time of a clock, independent of other processes

                parts = partition_rows(
                    y, None, config, [1] * clients, Task("multiclass", classes), seed=0, notes=notes
                )

                assert time.process_time() - start < 30
                assert torch.equal(torch.cat(parts).sort().values, torch.arange(rows))
                assert min(map(len, parts)) >= min_size
                assert notes[0].startswith("data.partition.min_size: moved ")


def test_note_counts_moved_rows_and_clients() -> None:
    """Nearly all rows of a class go to one client, so that the others get their minimum."""
    y = torch.zeros(100, dtype=torch.int64)
    config = PartitionConfig(kind="dirichlet", alpha=1e-6, min_size=5)
    notes: list[str] = []
    parts = partition_rows(y, None, config, [1] * 4, TEN, seed=0, notes=notes)
    assert sorted(map(len, parts)) == [5, 5, 5, 85]
    assert notes == ["data.partition.min_size: moved 15 rows to 3 clients that had fewer than 5"]
    notes.clear()
    config = PartitionConfig(kind="dirichlet", alpha=1.0, min_size=1)
    partition_rows(labels(500), None, config, [1] * 4, TEN, seed=0, notes=notes)
    assert notes == []


@pytest.mark.filterwarnings("error")
def test_extreme_settings_do_not_overflow() -> None:
    y = labels(300, classes=2)
    for alpha in (1e-300, 1e-6, 1e-3):
        config = PartitionConfig(kind="dirichlet", alpha=alpha, min_size=20)
        parts = partition_rows(y, None, config, [1] * 12, Task("multiclass", 2), seed=3)
        assert min(map(len, parts)) >= 20
        assert torch.equal(torch.cat(parts).sort().values, torch.arange(300))
    for kind in ("dirichlet", "quantity"):
        config = PartitionConfig(kind=kind, alpha=1e308)
        parts = partition_rows(torch.arange(400) % 4, None, config, [1] * 10, TEN, seed=0)
        assert {len(part) for part in parts} == {40}
    config = PartitionConfig(kind="dirichlet", alpha=0.5, cap=1e308, min_size=1)
    parts = partition_rows(labels(400), None, config, [1, 1, 2], TEN, seed=0)
    assert sum(len(part) for part in parts) == 400


def test_classes_are_assigned_evenly_and_shared_by_size() -> None:
    y = torch.arange(2000) % 10
    parts = partition_rows(
        y, None, PartitionConfig(kind="classes", classes=2), [1] * 10, TEN, seed=0
    )
    class_counts = counts(parts, y) > 0
    assert (class_counts.sum(1) == 2).all() and (class_counts.sum(0) == 2).all()
    assert all(len(p) == 200 for p in parts)
    small, large = partition_rows(
        y, None, PartitionConfig(kind="classes", classes=10), [1, 3], TEN, seed=0
    )
    assert (len(small), len(large)) == (500, 1500)
    # six classes find a holder
    few = partition_rows(y, None, PartitionConfig(kind="classes", classes=2), [1] * 3, TEN, seed=0)
    assert (counts(few, y) > 0).sum().item() == 6 and all(len(p) == 400 for p in few)


def test_dirichlet_below_a_cap() -> None:
    """Check that full clients get no more rows and the others share them proportionally."""
    y = torch.arange(10_000) % 10
    for cap in (1.0, 2.0):
        config = PartitionConfig(kind="dirichlet", alpha=0.1, cap=cap, min_size=1)
        parts = partition_rows(y, None, config, [1] * 10, TEN, seed=3)
        class_counts = counts(parts, y).double()
        before = class_counts.cumsum(1) - class_counts
        assert (class_counts[before >= cap * 1000] == 0).all()
        assert torch.equal(torch.cat(parts).sort().values, torch.arange(10_000))
        free = partition_rows(
            y, None, PartitionConfig(kind="dirichlet", alpha=0.1, min_size=1), [1] * 10, TEN, seed=3
        )
        # no client is full before the first class
        assert torch.equal(counts(parts, y)[:, 0], counts(free, y)[:, 0])
        assert class_counts.sum(1).max() <= cap * 1000 + 1000 and (
            counts(free, y).sum(1).max() > class_counts.sum(1).max() or cap == 2
        )
    sized = partition_rows(
        y,
        None,
        PartitionConfig(kind="dirichlet", alpha=0.1, cap=1, min_size=1),
        [1, 9],
        TEN,
        seed=0,
    )
    assert len(sized[0]) <= 1000 + 1000
    loose = PartitionConfig(kind="dirichlet", alpha=0.1, cap=1e9, min_size=1)
    assert all(
        torch.equal(a, b)
        for a, b in zip(partition_rows(y, None, loose, [1] * 10, TEN, seed=3), free, strict=True)
    )


def test_cut_below_redistributes_by_proportions() -> None:
    proportions, rows = (
        np.array([[0.6, 0.3, 0.1], [0.6, 0.3, 0.1], [1.0, 0.0, 0.0]]),
        np.array([100, 100, 90]),
    )
    dealt = cut_below(proportions, rows, np.array([50, 100, 200]))
    assert dealt.tolist() == [[60, 30, 10], [0, 75, 25], [0, 0, 90]]
    even = cut_below(proportions[[0, 2]], np.array([100, 90]), np.array([50, 200, 200]))
    # all other clients have proportion 0: shared evenly
    assert even.tolist() == [[60, 30, 10], [0, 45, 45]]


def test_classes_may_differ_in_number_and_be_few_shot() -> None:
    y = torch.arange(10_000) % 10
    config = PartitionConfig(kind="classes", classes=3, classes_spread=2, shots=90)
    parts = partition_rows(y, None, config, [1] * 20, TEN, seed=0)
    class_counts = counts(parts, y)
    many = (class_counts > 0).sum(1)
    assert set(many.tolist()) == {2, 3, 4, 5} and ((class_counts == 0) | (class_counts == 90)).all()
    assert len(torch.cat(parts).unique()) == len(torch.cat(parts))
    one = partition_rows(
        y, None, PartitionConfig(kind="classes", classes=1, classes_spread=1), [1] * 20, TEN, seed=0
    )
    assert set((counts(one, y) > 0).sum(1).tolist()) == {1, 2}
    sized = partition_rows(
        y, None, PartitionConfig(kind="classes", classes=2, shots=90), [1, 3], TEN, seed=0
    )
    assert [len(p) for p in sized] == [90, 270]


def test_quantity_skews_sizes_only() -> None:
    y = labels(10_000, classes=4)
    parts = partition_rows(
        y, None, PartitionConfig(kind="quantity", alpha=0.3), [1] * 8, Task("multiclass", 4), seed=1
    )
    sizes = torch.tensor([len(p) for p in parts]).double()
    assert sizes.max() > 4 * sizes.median()
    assert (counts(parts, y)[sizes.argmax()] / sizes.max() - 0.25).abs().max() < 0.05


def test_natural_partition_keeps_groups() -> None:
    y, group = labels(100), torch.arange(100) % 3 * 5  # groups 0, 5, 10
    parts = partition_rows(y, group, PartitionConfig(kind="natural"), [1, 1, 1], TEN, seed=0)
    assert all((group[p] == g).all() for p, g in zip(parts, (0, 5, 10), strict=True))


def test_strata_of_multilabel_and_regression() -> None:
    # rarest label: 2, then 1, then 0
    y = torch.tensor([[1.0, 1, 0], [1, 0, 0], [0, 0, 0], [1, 0, 1], [1, 1, 0]])
    assert row_strata(y, Task("multilabel", 3)).tolist() == [2, 1, 0, 3, 2]
    tenths = row_strata(torch.randperm(1000)[:, None].float(), Task("regression", 1))
    assert torch.bincount(tenths).tolist() == [100] * 10
    assert row_strata(torch.zeros(5, 1), Task("regression", 1)).unique().numel() == 1
    for task, targets in (
        (Task("multilabel", 3), y.repeat(50, 1)),
        (Task("regression", 1), torch.randn(200, 1)),
    ):
        parts = partition_rows(
            targets, None, PartitionConfig(kind="dirichlet"), [1] * 4, task, seed=0
        )
        assert torch.equal(torch.cat(parts).sort().values, torch.arange(len(targets)))


def test_partition_depends_on_the_seed() -> None:
    y = labels(500)
    for kind in ("iid", "dirichlet", "classes", "quantity"):
        first, second = (
            partition_rows(y, None, PartitionConfig(kind=kind), [1] * 5, TEN, seed=seed)
            for seed in (0, 1)
        )
        assert any(not torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_in_order_partition_gives_equal_slices() -> None:
    parts = partition_rows(
        labels(103), None, PartitionConfig(kind="in_order", min_size=1), [1.0] * 10, TEN, seed=3
    )
    assert torch.equal(torch.cat(parts), torch.arange(103)) and {len(p) for p in parts} == {10, 11}
    first, second = partition_rows(
        labels(40), None, PartitionConfig(kind="in_order", min_size=1), [3.0, 1.0], TEN, seed=4
    )
    assert torch.equal(first, torch.arange(30)) and torch.equal(second, torch.arange(30, 40))


def labels_of(rows: int) -> torch.Tensor:
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
            labels_of(100),
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
    partition_rows(
        labels_of(100), None, PartitionConfig(kind="few"), [1, 1], TEN, seed=0, notes=notes
    )
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
        parts = partition_rows(labels_of(100), None, config, [1, 1], TEN, seed=0)
    except UserError as error:
        assert str(error).startswith("data.partition.kind: strange") and "\n" not in str(error)
    else:
        assert len(torch.cat(parts).unique()) == len(torch.cat(parts)) and len(parts) == 2
    finally:
        patch.undo()
        registered_partition_kinds.discard("strange")
