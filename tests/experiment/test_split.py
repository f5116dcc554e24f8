"""Dividing one data set among new clients with `hetero_fl.split`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import hetero_fl as hfl
from hetero_fl.data import from_arrays
from tests.support.python_federations import Net, images, table


def numbered(rows: int = 120) -> tuple[np.ndarray, np.ndarray]:
    """Return a table whose first column is the row number, and three classes."""
    x = np.stack([np.arange(rows), np.ones(rows)], 1).astype("float32")
    return x, np.arange(rows) % 3


def rows_of(clients: list[hfl.Client]) -> dict[str, list[int]]:
    return {client.name: client.data.train.x[:, 0].int().tolist() for client in clients}


@pytest.mark.parametrize(
    ("partition", "classes"),
    [
        (None, 3),
        (hfl.Dirichlet(alpha=0.5), None),
        (hfl.Quantity(alpha=1.0), 3),
        (hfl.Classes(classes=1), 1),
    ],
)
def test_split_gives_each_row_with_its_label_to_one_client(partition: Any, classes: int) -> None:
    clients = hfl.split(numbered(), clients=4, partition=partition)

    found = rows_of(clients)
    assert list(found) == ["client_1", "client_2", "client_3", "client_4"]
    assert sorted(row for rows in found.values() for row in rows) == list(range(120))
    for client in clients:
        rows = client.data.train
        assert torch.equal(rows.x[:, 0].long() % 3, rows.y)
        assert classes in (None, len(rows.y.unique()))


def test_split_depends_on_the_seed_only() -> None:
    def divided(seed: int, global_seed: int) -> dict[str, list[int]]:
        torch.manual_seed(global_seed)
        np.random.seed(global_seed)
        return rows_of(hfl.split(numbered(), clients=3, seed=seed))

    assert divided(1, global_seed=1) == divided(1, global_seed=2)
    assert divided(1, global_seed=1) != divided(2, global_seed=1)


def test_split_divides_training_rows_only() -> None:
    x, y = numbered()
    dataset = from_arrays(x[:90], y[:90], test=(x[90:], y[90:]), num_classes=3)

    clients = hfl.split(dataset, clients=["north", "south"])

    assert list(rows_of(clients)) == ["north", "south"]
    assert sorted(row for rows in rows_of(clients).values() for row in rows) == list(range(90))
    assert all(client.data.test is None for client in clients)


def test_split_passes_models_in_turn_and_settings_to_each_client() -> None:
    clients = hfl.split(
        images(90, 1),
        clients=3,
        model=["mlp", Net],
        preprocess=hfl.Preprocess(resize=12),
        optimizer=hfl.SGD(lr=0.05),
        epochs=3,
        shares=["predictions"],
    )

    assert [client.model for client in clients] == ["mlp", Net, "mlp"]
    assert [client.init for client in clients] == ["seeded"] * 3
    own = hfl.Federation([clients[0], clients[2]], test=images(30, 9))
    for info in own.prepare(hfl.Local()).federation.client_infos.values():
        assert info.settings.epochs == 3
        assert info.settings.optimizer.lr == 0.05
        assert list(info.settings.shares) == ["predictions"]
        assert info.arch.input_shape == (1, 12, 12)


def test_split_reads_the_label_column() -> None:
    frame = table(60, 1).rename(columns={"ill": "state"})

    clients = hfl.split(frame, clients=2, label="state")

    assert clients[0].data.columns == ("age", "dose")
    assert sum(len(client.data.train) for client in clients) == 60


def test_split_loads_a_source_by_name() -> None:
    by_name = hfl.split("digits", clients=2)
    by_source = hfl.split({"name": "digits"}, clients=2)

    first, second = (clients[1].data.train for clients in (by_name, by_source))
    assert torch.equal(first.x, second.x)
