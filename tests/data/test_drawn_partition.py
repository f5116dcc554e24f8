"""Partitions of kind drawn: independent of the order of access and of other clients."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from hetero_fl.config import expand_population
from hetero_fl.config.clients import ClientSettings
from hetero_fl.config.data import DataConfig, PartitionConfig, SourceConfig, SplitConfig
from hetero_fl.data import FederatedData, federate, make_table
from hetero_fl.experiment.configuration import load_config
from hetero_fl.utils.caching import BoundedCache
from tests.support.federated_data import PLAIN, PLAIN_CLIENT, identical, numbered, rows_of

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
