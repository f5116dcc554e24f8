"""Assignment of rows to clients, test sets and the proxy set."""

from __future__ import annotations

import random
from dataclasses import replace

import torch
from hypothesis import given, settings, strategies as st

from hetero_fl.config.clients import ClientSettings
from hetero_fl.config.data import DataConfig, PartitionConfig, ProxyConfig, SplitConfig
from hetero_fl.data import Dataset, federate
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
    other = federate(
        numbered(groups=groups),
        config,
        {"site_2": PLAIN_CLIENT, "site_10": PLAIN_CLIENT, "x": PLAIN_CLIENT},
        0,
    )
    # otherwise in natural order
    assert all(row % 3 == 1 for row in rows_of(other, "site_2", "train"))


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
