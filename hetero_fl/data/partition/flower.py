"""Partitions of `flwr-datasets`, selected by class name as `flwr:NAME`."""

from __future__ import annotations

import inspect
import io
import warnings
from contextlib import contextmanager, redirect_stderr
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hetero_fl.config.data import FLOWER_PREFIX
from hetero_fl.data.partition.context import PartitionContext
from hetero_fl.data.partition.groups import WHERE, match_groups
from hetero_fl.data.partition.user_code import check_arguments, check_parts
from hetero_fl.utils.code_permission import CODE_PREFIX
from hetero_fl.utils.errors import UserError, one_line, suggest_or_list
from hetero_fl.utils.registry import import_reference
from hetero_fl.utils.seeding import stream_key

if TYPE_CHECKING:
    from collections.abc import Iterator

ROW = "hetero_fl_row"
"""Column with the row indices in the data set that a partitioner divides."""
DIRICHLET = f"{FLOWER_PREFIX}DirichletPartitioner"
INNER_DIRICHLET = f"{FLOWER_PREFIX}InnerDirichletPartitioner"
_FILLED = ("num_partitions", "seed", "min_partition_size")
"""Arguments that are filled in if they are not set."""


def flower_partition(context: PartitionContext) -> list[Tensor]:
    """Partition rows with a partitioner of `flwr-datasets`.

    The name of the class follows the prefix `flwr:` in `config.kind`, and `config.arguments` are
    its arguments. If they are not set, `num_partitions` is the number of clients, `seed` depends on
    the seed of the run, and `min_partition_size` is `config.min_size`. The partitioner sees the
    rows in a random order, as with `FederatedDataset(shuffle=True)`.

    Partitions are assigned to the clients in order. With `NaturalIdPartitioner`, the values of the
    column are matched with the client ids as in the partition `natural`.

    Args:
        context: Inputs of the partition.

    Returns:
        Sorted row indices of each client.

    Raises:
        UserError: If `flwr-datasets` is not installed, the class, an argument or a column is
            unknown, the partitioner raises an error, or the number of partitions differs from the
            number of clients.
    """
    kind = context.config.kind
    where = f"{WHERE}.kind: {kind}"
    partitioner_class = _find_class(kind)
    arguments = _arguments(partitioner_class, context)
    order = context.shuffled(torch.arange(context.num_rows), "flwr")
    with _one_line_errors(where):
        partitioner = partitioner_class(**arguments)
        partitioner.dataset = _hub_dataset(arguments.get("partition_by"), context, order)
        count = partitioner.num_partitions
    names = getattr(partitioner, "partition_id_to_natural_id", None) or {}
    groups = [str(names[k]) for k in sorted(names)]
    if groups:
        context.notes.extend(match_groups(groups, list(context.clients), kind, kind))
    if count != len(context.clients):
        raise UserError(
            f"{where}: expected one partition per client, got {count} partitions for "
            f"{len(context.clients)} clients"
        )
    with _one_line_errors(where):
        found = [partitioner.load_partition(k)[ROW] for k in range(count)]
    parts = check_parts([list(part) for part in found], context, where)
    if set(groups) == set(context.clients):
        return [parts[groups.index(client)] for client in context.clients]
    return parts


def _find_class(kind: str) -> type[Any]:
    """Return the partitioner class that a kind `flwr:NAME` names."""
    name = kind.removeprefix(FLOWER_PREFIX)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from flwr_datasets import partitioner
    except ImportError as error:
        raise UserError(
            f"{WHERE}.kind: {kind} needs flwr-datasets; run pip install "
            f"'hetero_fl[flower-datasets]' ({one_line(error)})"
        ) from error
    classes = {
        title: found
        for title, found in vars(partitioner).items()
        if isinstance(found, type)
        and issubclass(found, partitioner.Partitioner)
        and not inspect.isabstract(found)
    }
    if name.startswith("Vertical") and name in classes:
        raise UserError(
            f"{WHERE}.kind: {kind} divides columns instead of rows; set preprocess.columns of the "
            "clients"
        )
    horizontal = [title for title in classes if not title.startswith("Vertical")]
    if name not in classes:
        raise UserError(
            f"{WHERE}.kind: unknown partitioner '{name}' of flwr-datasets"
            f"{suggest_or_list(name, horizontal)}"
        )
    return classes[name]


def _arguments(partitioner_class: type[Any], context: PartitionContext) -> dict[str, Any]:
    """Return the checked arguments of a partitioner, with defaults from the run."""
    kind = context.config.kind
    given = dict(context.config.arguments or {})
    check_arguments(partitioner_class, given, kind, provided=_FILLED)
    clients = len(context.clients)
    if given.get("num_partitions", clients) != clients:
        raise UserError(
            f"{WHERE}.num_partitions: must be {clients}, the number of clients, got "
            f"{given['num_partitions']}; remove it"
        )
    column = given.get("partition_by")
    if column is not None and column not in context.columns:
        raise UserError(
            f"{WHERE}.partition_by: no column '{column}'{suggest_or_list(column, context.columns)}"
        )
    # Partitioners expect floating-point numbers and arrays, which YAML may write differently.
    for name, value in given.items():
        if isinstance(value, str) and value.startswith(CODE_PREFIX):
            given[name] = import_reference(value, f"{WHERE}.{name}", takes="partition_id")
        elif name == "distribution_array":
            given[name] = _array(value, name)
    filled = {
        "num_partitions": clients,
        "seed": stream_key("data", context.seed, "partition", "flwr"),
        "min_partition_size": context.min_rows,
    }
    accepted = inspect.signature(partitioner_class).parameters
    return {name: filled[name] for name in _FILLED if name in accepted} | given


def _array(value: Any, name: str) -> np.ndarray:
    try:
        return np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{WHERE}.{name}: expected a list of rows of numbers ({one_line(error)})"
        ) from error


def _hub_dataset(column: str | None, context: PartitionContext, order: Tensor) -> Any:
    """Return a `datasets.Dataset` with the row indices and the column to partition by."""
    from datasets import Dataset

    content = {ROW: order.tolist()}
    if column is not None:
        values = context.columns[column][order.numpy()]
        if context.config.kind == INNER_DIRICHLET:
            # This partitioner expects class numbers from 0.
            values = np.unique(values, return_inverse=True)[1]
        content[column] = values.tolist()
    return Dataset.from_dict(content)


@contextmanager
def _one_line_errors(where: str) -> Iterator[None]:
    """Convert all errors to a UserError, and suppress warnings and progress bars."""
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    # The partitioners raise exceptions of many types.
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error, 200)}"
        advice = f"; {WHERE}.kind=dirichlet moves rows instead" if where.endswith(DIRICHLET) else ""
        raise UserError(f"{where}: cannot partition the rows ({reason}){advice}") from error
