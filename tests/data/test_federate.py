"""Assignment of rows to clients, test sets and the proxy set, in all kinds of partition."""

from __future__ import annotations

import pickle
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st

from hetero_fl.config import expand_population
from hetero_fl.config.clients import ClientSettings
from hetero_fl.config.data import (
    DataConfig,
    PartitionConfig,
    ProxyConfig,
    SourceConfig,
    SplitConfig,
)
from hetero_fl.data import Dataset, FederatedData, federate, load_source, make_table
from hetero_fl.experiment.configuration import load_config
from hetero_fl.utils.caching import BoundedCache
from hetero_fl.utils.text import Caution
from tests.support.federated_data import (
    PLAIN,
    PLAIN_CLIENT,
    THREE,
    heterogeneous,
    identical,
    numbered,
    rows_of,
    view,
)
from tests.support.mistakes import check_refused


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(["iid", "dirichlet", "classes", "quantity"]),
    clients=st.integers(1, 6),
    proxy=st.integers(0, 40),
    limit=st.integers(120, 260),
    given_validation=st.booleans(),
    seed=st.integers(0, 999),
)
def test_training_rows_are_in_exactly_one_location(
    kind: str, clients: int, proxy: int, limit: int, given_validation: bool, seed: int
) -> None:
    dataset = numbered(validation=(torch.full((5, 1), 1e4), [0] * 5) if given_validation else None)
    config = DataConfig(
        train_limit=limit,
        proxy=ProxyConfig(size=proxy),
        partition=PartitionConfig(kind=kind, classes=4, min_size=6),
    )
    data = federate(dataset, config, {f"c{i}": PLAIN_CLIENT for i in range(clients)}, seed)
    places = [rows_of(data, c, s) for c in data.client_ids for s in ("train", "validation", "test")]
    if proxy:
        places.append(rows_of(data, "", "proxy"))
    if not given_validation:
        places.append(rows_of(data, "", "common_validation"))
    every = sorted(row for place in places for row in place)
    assert len(every) == len(set(every)) == min(limit, 200)
    assert all(place for place in places)
    assert data.n_proxy == proxy and data.n_test == 40
    assert (
        data.n_train
        == sum(data.n_rows(c, "train") for c in data.client_ids)
        == len(rows_of(data, "server", "pooled"))
    )
    for client in data.client_ids:
        columns = data.columns(client, "train", PLAIN)
        assert torch.equal(columns["y"], columns["x"].flatten().long() % 4)
        assert (
            data.label_counts(client).tolist() == torch.bincount(columns["y"], minlength=4).tolist()
        )
    assert all(row < 0 for row in rows_of(data, "", "common_test"))


def test_order_of_clients_does_not_matter(images: Dataset) -> None:
    clients = list(heterogeneous().items())
    first = view(images)
    for seed in range(3):
        random.Random(seed).shuffle(clients)
        other = view(images, clients=dict(clients))
        assert identical(first, other) and first.content_hash() == other.content_hash()
    assert not identical(first, view(images, seed=1))


def test_proxy_labels_are_never_read(images: Dataset) -> None:
    plain = view(images)
    proxy_rows = plain.public_sets["proxy"].rows
    assert images.train.y is not None
    scrambled = images.train.y.clone()
    scrambled[proxy_rows] = (scrambled[proxy_rows] + 1 + torch.arange(len(proxy_rows)) % 3) % 4
    assert (scrambled[proxy_rows] != images.train.y[proxy_rows]).all()
    other = view(replace(images, train=replace(images.train, y=scrambled)))
    assert identical(plain, other) and plain.content_hash() == other.content_hash()
    assert set(plain.columns("one", "proxy", PLAIN)) == {"x"}
    assert plain.public_sets["proxy"].examples.y is None
    # the comparison would notice a label that is read
    scrambled[plain.client_rows["one"]["train"].rows[0]] += 1
    scrambled %= 4
    third = view(replace(images, train=replace(images.train, y=scrambled)))
    assert not identical(plain, third) and plain.content_hash() != third.content_hash()


def test_proxy_labels_are_kept_if_configured(
    images: Dataset,
) -> None:
    assert images.train.y is not None
    plain = view(images)
    size = len(plain.public_sets["proxy"].rows)

    labeled = view(images, proxy=ProxyConfig(size=size, labels=True))

    columns = labeled.columns("one", "proxy", PLAIN)
    assert torch.equal(columns["x"], plain.columns("one", "proxy", PLAIN)["x"])
    assert torch.equal(columns["y"], images.train.y[plain.public_sets["proxy"].rows])
    assert labeled.has_proxy_labels and not plain.has_proxy_labels
    for name in ("common_test", "common_validation"):
        assert torch.equal(
            labeled.columns("one", name, PLAIN)["x"], plain.columns("one", name, PLAIN)["x"]
        )


def test_limits_apply_and_test_rows_do_not_depend_on_the_seed() -> None:
    config = DataConfig(train_limit=100, test_limit=15, proxy=ProxyConfig(size=20))
    first, second = (federate(numbered(), config, THREE, seed) for seed in (0, 1))
    assert first.n_test == 15 and rows_of(first, "", "common_test") == rows_of(
        second, "", "common_test"
    )
    assert rows_of(first, "", "proxy") != rows_of(second, "", "proxy")
    total = sum(first.n_rows(c, s) for c in "abc" for s in ("train", "validation", "test"))
    assert total + 20 + len(rows_of(first, "", "common_validation")) == 100
    carved = federate(replace(numbered(), test=None), DataConfig(), THREE, 0)
    assert carved.n_test == 40 and rows_of(carved, "", "common_test") == rows_of(
        federate(replace(numbered(), test=None), DataConfig(), THREE, 1), "", "common_test"
    )


def test_split_sizes_and_fractions() -> None:
    clients = {"a": ClientSettings(size=1), "b": ClientSettings(size=3)}
    config = DataConfig(split=SplitConfig(validation=0.1, test=0.2), validation=0.2)
    data = federate(numbered(), config, clients, 0)
    assert [[data.n_rows(c, s) for s in ("train", "validation", "test")] for c in "ab"] == [
        [28, 4, 8],
        [84, 12, 24],
    ]
    small = DataConfig(split=SplitConfig(validation=0.01, test=0.01))
    found = federate(numbered(), small, clients, 0)
    # at least one row
    assert [found.n_rows("a", s) for s in ("train", "validation", "test")] == [43, 1, 1]
    none = federate(numbered(), DataConfig(split=SplitConfig(validation=0, test=0)), clients, 0)
    assert (
        none.columns("a", "test", PLAIN)["x"].shape == (0, 1)
        and none.n_rows("a", "validation") == 0
    )


def test_clients_split_with_independent_draws() -> None:
    data = federate(numbered(), DataConfig(), {"a": PLAIN_CLIENT, "b": PLAIN_CLIENT}, 0)
    places = []
    for client in "ab":
        parts = {s: rows_of(data, client, s) for s in ("train", "validation", "test")}
        client_rows = sorted(row for part in parts.values() for row in part)
        places.append([client_rows.index(row) for row in parts["test"]])
    assert len(places[0]) == len(places[1]) and places[0] != places[1]


def test_natural_groups_match_clients_by_name() -> None:
    groups = [("c", "a", "b")[i % 3] for i in range(200)]
    config = DataConfig(partition=PartitionConfig(kind="natural"))
    data = federate(numbered(groups=groups), config, THREE, 0)
    for i, client in enumerate("cab"):
        assert all(
            row % 3 == i
            for s in ("train", "validation", "test")
            for row in rows_of(data, client, s)
        )
    dataset = numbered(groups=groups)  # its groups a, b, c are rows 1, 2, 0 modulo 3

    renamed = replace(dataset, train=replace(dataset.train, group_names=("b", "c", "a")))
    data = federate(renamed, config, THREE, 0)
    assert [rows_of(data, client, "train")[0] % 3 for client in "abc"] == [0, 1, 2]


def test_in_order_partition_sorts_client_ids_naturally() -> None:
    names = [f"c{i}" for i in range(12)]
    config = DataConfig(
        partition=PartitionConfig(kind="in_order", min_size=2),
        split=SplitConfig(validation=0, test=0),
        validation=0,
    )
    data = federate(
        numbered(204), config, dict.fromkeys(random.Random(1).sample(names, 12), PLAIN_CLIENT), 5
    )
    assert [rows_of(data, name, "train") for name in names] == [
        list(range(17 * i, 17 * i + 17)) for i in range(12)
    ]
    assert rows_of(data, "", "common_validation") == [] and data.n_train == 204
    patients = numbered(204, patient=[i // 2 for i in range(204)])
    assert federate(patients, config, dict.fromkeys(names, PLAIN_CLIENT), 5).n_train == 204


NATURAL = DataConfig(partition=PartitionConfig(kind="natural"))


def test_clients_of_other_names_get_groups_in_order() -> None:
    dataset = numbered(groups=[("east", "north", "south")[i % 3] for i in range(200)])
    other = federate(dataset, NATURAL, dict.fromkeys(("c_1", "c_10", "c_2"), PLAIN_CLIENT), 0)
    assert other.notes == [
        (
            "arrays: no client has the name of a group; 'c_1' gets "
            "'east', 'c_2' gets 'north', 'c_10' gets 'south'"
        )
    ]
    for number, client in enumerate(("c_1", "c_2", "c_10")):
        assert all(row % 3 == number for row in rows_of(other, client, "train"))
    full = federate(dataset, NATURAL, {"all": PLAIN_CLIENT}, 0)
    assert full.notes == [
        "arrays: client 'all' gets the rows of all groups: 'east', 'north', 'south'"
    ]
    assert not federate(
        dataset, DataConfig(), {"est": PLAIN_CLIENT, "north": PLAIN_CLIENT}, 0
    ).notes


def test_group_without_training_rows_is_named() -> None:
    """Refuse a group whose ten rows leave no training rows."""
    dataset = numbered(groups=["east"] * 100 + ["north"] * 90 + ["south"] * 10)
    assert dataset.train.group_names == ("east", "north", "south")
    dataset = replace(
        dataset,
        train=dataset.train.select_rows(torch.arange(190)),
        test=dataset.train.select_rows(torch.arange(150, 200)),
    )
    check_refused(
        "3 groups for 2 clients in arrays: no client for group 'south'",
        federate,
        dataset,
        NATURAL,
        dict.fromkeys(("east", "north"), PLAIN_CLIENT),
        0,
    )
    check_refused(
        "natural: group 'south' of arrays has no training rows left",
        federate,
        dataset,
        NATURAL,
        dict.fromkeys(("east", "north", "south"), PLAIN_CLIENT),
        0,
    )
    full = federate(dataset, NATURAL, {"all": PLAIN_CLIENT}, 0)
    assert (
        "arrays: client 'all' gets the rows of all groups: 'east', 'north', 'south'" in full.notes
    )


def test_labels_of_all_files_are_matched(tmp_path: Path) -> None:
    """Match labels in different spellings: 0 and 0.0, " Yes" and "Yes"."""
    base = pd.DataFrame({"u": range(90), "v": [-i for i in range(90)]})
    for common, local, names in (
        ([0, 1] * 45, [0.0, 1.0] * 45, ("0", "1")),
        ([0.0, 1.0] * 45, ["0 ", " 1.0"] * 45, ("0", "1")),
        (["No", "Yes"] * 45, ["No ", " Yes"] * 45, ("No", "Yes")),
        # regression; whole numbers by chance
        ([i / 2 for i in range(90)], [i % 3 for i in range(90)], ("ill",)),
    ):
        for file, first, labels in (("all", 0, common), ("own", 90, local)):
            base.assign(u=base["u"] + first, ill=labels).to_csv(
                tmp_path / f"{file}.csv", index=False
            )
        source = SourceConfig(name="table", path=str(tmp_path / "all.csv"), label="ill")
        own = ClientSettings(data=source.model_copy(update={"path": str(tmp_path / "own.csv")}))
        dataset = load_source(source, tmp_path)
        assert dataset.task.names == names
        data = federate(dataset, DataConfig(), {"own": own, "rest": PLAIN_CLIENT}, 0)
        notes = [note for note in data.notes if not isinstance(note, Caution)]
        assert notes[0].startswith("table all.csv: label ill; columns used: u, v; left out: none")
        assert notes[1].startswith("clients: 'own': data: table own.csv: label ill")


def test_local_sets_replace_held_out_rows_of_a_client() -> None:
    dataset = numbered(60, groups=["a"] * 30 + ["b"] * 20 + ["c"] * 10)
    local = numbered(12, groups=["b"] * 8 + ["a"] * 4).train
    dataset = replace(dataset, local_sets={"test": local})
    partition = PartitionConfig(kind="natural", min_size=2)
    config = DataConfig(partition=partition, validation=0)

    data = federate(dataset, config, dict.fromkeys("abc", PLAIN_CLIENT), seed=0)

    assert rows_of(data, "a", "test") == [8, 9, 10, 11]
    assert rows_of(data, "b", "test") == list(range(8))
    assert rows_of(data, "c", "test") == []
    # Validation rows are held out of the training rows, and no test rows are.
    for client, count in (("a", 30), ("b", 20), ("c", 10)):
        validation = round(0.15 * count)
        assert data.n_rows(client, "validation") == validation
        assert data.n_rows(client, "train") == count - validation


def test_local_sets_are_ignored_in_other_partitions() -> None:
    dataset = numbered(90, groups=["a", "b", "c"] * 30)
    with_local = replace(
        dataset, local_sets={"test": numbered(9, groups=["a", "b", "c"] * 3).train}
    )
    clients = dict.fromkeys("abc", PLAIN_CLIENT)

    plain = federate(dataset, DataConfig(), clients, seed=0)
    data = federate(with_local, DataConfig(), clients, seed=0)

    assert plain.content_hash() == data.content_hash()


SPLITS = ("train", "validation", "test")
LARGE = {"large": ClientSettings(size=2)}


def drawn(
    clients: Any = 30,
    pool: int = 400,
    seed: int = 0,
    split: SplitConfig | None = None,
    **partition: Any,
) -> FederatedData:
    if isinstance(clients, int):
        clients = expand_population(load_config({"clients": {"count": clients}}).clients)
    config = DataConfig(
        partition=PartitionConfig(kind="drawn", **partition), split=split or SplitConfig()
    )
    return federate(numbered(pool), config, clients, seed)


@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    alpha=st.one_of(st.none(), st.floats(1e-3, 50)),
    spread=st.sampled_from([0.0, 0.5, 2.0]),
    rows=st.integers(20, 200),
    seed=st.integers(0, 99),
)
def test_drawn_rows_do_not_depend_on_the_order_of_access(
    alpha: float | None, spread: float, rows: int, seed: int
) -> None:
    data, other = (drawn(12, seed=seed, alpha=alpha, spread=spread, rows=rows) for _ in range(2))
    # draw all clients in advance
    expected = {c: {s: rows_of(data, c, s) for s in SPLITS} for c in data.client_ids}
    # the cache keeps one client's rows only
    object.__setattr__(other.client_rows.lazy_partition, "_cached_splits", BoundedCache(1))
    pool = set(data.client_rows.lazy_partition.pool.rows.tolist())  # type: ignore[union-attr]
    for client in reversed(data.client_ids):
        assert {s: other.n_rows(client, s) for s in SPLITS} == {
            s: len(r) for s, r in expected[client].items()
        }
        assert {s: other.client_rows[client][s].rows.tolist() for s in SPLITS} == expected[client]
        every = [row for part in expected[client].values() for row in part]
        # every row at most once, from the pool
        assert len(every) == len(set(every)) >= 20 and set(every) <= pool
        if spread == 0:
            assert len(every) == rows
    assert identical(data, other) and data.content_hash() == other.content_hash()
    assert identical(data, pickle.loads(pickle.dumps(data)))


def test_drawn_rows_do_not_depend_on_other_clients() -> None:
    few, many = drawn(10, alpha=0.5, spread=0.5), drawn(99, alpha=0.5, spread=0.5)
    names = {f"client_{i:02}": PLAIN_CLIENT for i in (3, 7, 50)}
    some = drawn(names, alpha=0.5, spread=0.5)
    for split in SPLITS:
        assert all(rows_of(some, c, split) == rows_of(many, c, split) for c in names)
        assert rows_of(few, "client_07", split) == rows_of(many, "client_07", split)
    assert rows_of(few, "client_07", "train") != rows_of(few, "client_08", "train")
    assert rows_of(few, "client_07", "train") != rows_of(
        drawn(10, seed=1, alpha=0.5, spread=0.5), "client_07", "train"
    )


def test_million_clients_are_drawn_lazily() -> None:
    data = drawn(1_000_000, pool=1000)
    train = rows_of(data, "client_0700000", "train")
    assert (
        len(train) == data.n_rows("client_0700000", "train") == 60
        and data.n_train == 900
        and data.n_test == 40
    )
    assert data.label_counts("client_0700000").tolist() == [
        sum(r % 4 == c for r in train) for c in range(4)
    ]
    assert len(data.client_rows.lazy_partition._cached_splits) == 1  # type: ignore[union-attr]
    with pytest.raises(KeyError):
        data.columns("client_1000001", "train", PLAIN)


def test_label_shares_follow_the_dirichlet_distribution() -> None:
    """Check the variance of class shares, (1/C)(1 - 1/C) / (C·alpha + 1)."""
    clients, classes = 400, 4
    for alpha in (0.3, 3.0):
        data = drawn(clients, pool=8000, split=SplitConfig(validation=0, test=0), alpha=alpha)
        share = torch.stack([data.label_counts(c) for c in data.client_ids]) / 100
        expected = (1 / classes) * (1 - 1 / classes) / (classes * alpha + 1)
        assert share.var(0, correction=0).mean().item() == pytest.approx(expected, rel=0.15)
        assert share.mean(0).tolist() == pytest.approx([0.25] * classes, abs=0.06)
    even = drawn(clients, pool=8000, split=SplitConfig(validation=0, test=0))
    share = torch.stack([even.label_counts(c) for c in even.client_ids]) / 100
    # rows at random
    assert share.var(0).mean().item() == pytest.approx(0.25 * 0.75 / 100, rel=0.25)


def test_rare_classes_are_replaced_by_others() -> None:
    for alpha in (1e-300, 1e-6, 1e-3):
        data = drawn(20, pool=200, alpha=alpha)
        for client in data.client_ids:
            assert sum(data.n_rows(client, s) for s in SPLITS) == 100, alpha
            assert sum(len(rows_of(data, client, s)) for s in SPLITS) == 100


def test_numbers_of_rows_are_log_normal_and_follow_the_sizes() -> None:
    listed = {f"c{i}": ClientSettings(size=4 if i >= 200 else 1) for i in range(400)}
    data = drawn(listed, pool=40_000, spread=0.5, min_size=5)
    rows = np.array([[sum(data.n_rows(c, s) for s in SPLITS)] for c in listed]).reshape(2, 200)
    assert np.median(rows, 1).tolist() == pytest.approx([100, 400], rel=0.12)
    assert np.log(rows).std(1).tolist() == pytest.approx([0.5, 0.5], rel=0.15)


def test_client_may_have_a_source_of_its_own() -> None:
    config = DataConfig(partition=PartitionConfig(kind="drawn", rows=30))
    own = ClientSettings(data=SourceConfig(name="synthetic_table"))

    one = federate(make_table(), config, {"a": PLAIN_CLIENT, "b": own}, 0)

    assert one.n_rows("a", "train") == 18 and one.n_rows("b", "train") == 720


def test_default_alpha_depends_on_the_kind() -> None:
    assert PartitionConfig().alpha == 0.5 and PartitionConfig(kind="drawn").alpha is None
    assert "alpha" not in PartitionConfig(kind="dirichlet").model_fields_set
    plain = load_config({"data": {"partition": {"kind": "dirichlet"}}})
    assert load_config(plain, ["data.partition.kind=drawn"]).data.partition.alpha is None
