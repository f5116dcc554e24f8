"""A partition of the user's own: called with care, and its result checked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hetero_fl.config.source import PartitionConfig
from hetero_fl.data.patients import torn
from hetero_fl.errors import UserError
from hetero_fl.registry import imported
from hetero_fl.task import Task


def own_partition(
    y: Tensor,
    group: Tensor | None,
    config: PartitionConfig,
    sizes: Sequence[float],
    task: Task,
    seed: int,
    patient: Tensor | None = None,
) -> list[Tensor]:
    """Rows of each client as the function that `config.kind` names deals them; arguments and errors as of `deal`.

    The function itself gets no patients, but a deal that tears one apart is refused.
    """
    parts = _checked(_own(y, group, config, sizes, task, seed), config, len(y), len(sizes))
    if patient is not None and (rows := torn(parts, patient)) is not None:
        raise UserError(
            f"data.partition.kind: {config.kind}: deals rows {rows[0]} and {rows[1]}, which are of one patient "
            "(data.patient), to two clients"
        )
    return parts


def _own(
    y: Tensor, group: Tensor | None, config: PartitionConfig, sizes: Sequence[float], task: Task, seed: int
) -> object:
    """What a user's own partition returns."""
    where = "data.partition.kind"
    function = imported(config.kind, where)
    if not callable(function):
        raise UserError(f"{where}: {config.kind} is not a function of (y, group, config, sizes, task, seed)")
    try:
        return function(y, group, config, sizes, task, seed)
    except UserError as error:
        raise UserError(f"{where}: {config.kind}: {error}") from error
    except Exception as error:  # a user's function may fail in any way; the reason goes into the one line
        raise UserError(f"{where}: {config.kind} raised {type(error).__name__}: {error}") from error


def _checked(parts: object, config: PartitionConfig, rows: int, clients: int) -> list[Tensor]:
    """The rows that a user's own partition dealt, if they can be that."""
    where = f"data.partition.kind: {config.kind}"
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
