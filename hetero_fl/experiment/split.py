"""Make clients from one data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from hetero_fl.config.clients import ClientSettings
from hetero_fl.config.data import DataConfig, PartitionConfig
from hetero_fl.data.partition import assign_rows
from hetero_fl.data.sources.objects import to_dataset
from hetero_fl.experiment.client import Client, Model, plain_value
from hetero_fl.utils.errors import UserError


def split(
    data: Any,
    clients: int | Sequence[str],
    partition: PartitionConfig | None = None,
    *,
    model: Model | Sequence[Model] | None = None,
    label: str | None = None,
    seed: int = 0,
    **settings: Any,
) -> list[Client]:
    """Divide a data set among clients.

    Args:
        data: The data set, see `Client.data`. Each client gets a copy of its rows.
        clients: Number of clients, which are then named `client_1`, `client_2`, …; or their names.
        partition: How the rows are divided, such as `Dirichlet(alpha=0.5)`; by default at random.
        model: Model of the clients, or a list of models that they use in turn.
        label: Column of the labels in a DataFrame or a Hugging Face data set.
        seed: Seed of the partition.
        **settings: Further arguments of each `Client`.

    Raises:
        TypeError: If the data or the model is of another type.
        UserError: If there are too few rows, or an argument is invalid.

    Example:
        >>> import numpy as np
        >>> import hetero_fl as hfl
        >>> x, y = np.zeros((90, 28, 28), dtype=np.uint8), np.arange(90) % 3
        >>> clients = hfl.split((x, y), 3, hfl.Dirichlet(alpha=1.0), model=["mlp", "linear"])
        >>> [client.name for client in clients]
        ['client_1', 'client_2', 'client_3']
        >>> clients[1]
        Client('client_2', model=linear, data=Dataset of 27 rows)
    """
    if isinstance(clients, int):
        names = [f"client_{i}" for i in range(1, clients + 1)]
    else:
        names = list(clients)
    if not names:
        raise UserError("split: clients: expected at least one client, got none")
    dataset = to_dataset(data, "data", label)
    config = DataConfig.model_validate(
        {} if partition is None else {"partition": plain_value(partition)}
    )
    rows = torch.arange(len(dataset.train))
    shares = assign_rows(
        dataset,
        rows,
        names,
        config=config,
        clients={name: ClientSettings() for name in names},
        seed=seed,
        notes=[],
    )
    models = list(model) if isinstance(model, list | tuple) else [model]
    return [
        Client(
            name,
            models[i % len(models)],
            replace(dataset, train=shares[name].copy_rows(), validation=None, test=None),
            **settings,
        )
        for i, name in enumerate(names)
    ]
