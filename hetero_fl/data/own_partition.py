"""A partition of the user's own: called with care, and its result checked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hetero_fl.config.source import PartitionConfig
from hetero_fl.data.patients import torn
from hetero_fl.errors import UserError
from hetero_fl.registry import called

WHERE = "data.partition.kind"
TAKES = "y, group, config, sizes, task, seed"


def own_partition(
    config: PartitionConfig, arguments: tuple[Any, ...], rows: int, clients: int, patient: Tensor | None
) -> list[Tensor]:
    """Rows of each client as the function that `config.kind` names deals them, given the arguments.

    It gets no patients, but a deal that tears one apart is refused. Raises UserError for that and for whatever else it does.
    """
    parts = _checked(called(config.kind, WHERE, TAKES, arguments), config, rows, clients)
    if patient is not None and (pair := torn(parts, patient)) is not None:
        raise UserError(
            f"{WHERE}: {config.kind}: deals rows {pair[0]} and {pair[1]}, which are of one patient "
            "(data.patient), to two clients"
        )
    return parts


def _checked(parts: object, config: PartitionConfig, rows: int, clients: int) -> list[Tensor]:
    """The rows that a user's own partition dealt, if they can be that."""
    where = f"{WHERE}: {config.kind}"
    if not isinstance(parts, list | tuple) or len(parts) != clients:
        raise UserError(f"{where}: has to return a list of the rows of {clients} clients")
    try:
        dealt = [torch.as_tensor(part, dtype=torch.int64).reshape(-1).sort().values for part in parts]
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{where}: rows have to be whole numbers: {error}") from error
    every = torch.cat(dealt)
    if len(every) and (every.min() < 0 or every.max() >= rows):
        raise UserError(f"{where}: rows from {every.min()} to {every.max()}; there are {rows}")
    if len(every.unique()) < len(every):
        raise UserError(f"{where}: deals a row to two clients")
    if (short := min(map(len, dealt))) < config.min_size:
        raise UserError(f"{where}: deals {short} rows to a client; data.partition.min_size is {config.min_size}")
    return dealt
