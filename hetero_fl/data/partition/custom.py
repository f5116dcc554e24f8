"""Partitions by code of users and by `flwr-datasets`, with checks of arguments and results."""

from __future__ import annotations

import inspect
import io
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hetero_fl.config.data import FLOWER_PREFIX, PartitionConfig
from hetero_fl.core.images import dtype_name
from hetero_fl.data.partition.context import PartitionContext
from hetero_fl.data.partition.groups import WHERE, match_groups, split_patient_rows
from hetero_fl.utils.code_permission import CODE_PREFIX
from hetero_fl.utils.errors import UserError, one_line, suggest_or_list
from hetero_fl.utils.registry import import_reference
from hetero_fl.utils.seeding import stream_key
from hetero_fl.utils.text import pluralize

UserPartition = Callable[..., Any]
"""A function of a `PartitionContext`, or a subclass of `Partitioner`."""
SIX_ARGUMENTS = "y, group, config, sizes, task, seed"
"""Arguments of a partition function before `PartitionContext` was introduced."""
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
ROW = "hetero_fl_row"
"""Column with the row indices in the data set that a partitioner of Flower divides."""
DIRICHLET = f"{FLOWER_PREFIX}DirichletPartitioner"
INNER_DIRICHLET = f"{FLOWER_PREFIX}InnerDirichletPartitioner"
_FILLED_BY_RUN = ("num_partitions", "seed", "min_partition_size")
"""Arguments of Flower's partitioners that are filled in if they are not set."""


def call_partition(partition: UserPartition, context: PartitionContext) -> list[Tensor]:
    """Call a user-defined partition with the arguments of the configuration.

    Args:
        partition: Function of the context and keyword arguments, or subclass of `Partitioner` that
            is created with the keyword arguments.
        context: Inputs of the partition.

    Returns:
        Sorted row indices of each client.

    Raises:
        UserError: If an argument is unknown or missing, the function raises an error, or the result
            is not a partition.
    """
    kind = context.config.kind
    where = f"{WHERE}.kind: {kind}"
    arguments = context.config.arguments or {}
    check_arguments(partition, arguments, kind, filled=0 if isinstance(partition, type) else 1)
    try:
        if isinstance(partition, type):
            parts = partition(**arguments).partition(context)
        else:
            parts = partition(context, **arguments)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    # A user's function may raise any exception, or call sys.exit.
    except (Exception, SystemExit) as error:
        raise UserError(f"{where} raised {_describe(error)}") from error
    return check_parts(parts, context, where)


def _describe(error: BaseException) -> str:
    # The text of a KeyError is the repr of its argument.
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return f"{type(error).__name__}: {one_line(text)}"


def check_arguments(
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
    kind: str,
    *,
    filled: int = 0,
    provided: Collection[str] = (),
) -> None:
    """Check the names of the arguments of a partition, which are keys of `data.partition`.

    Args:
        function: Function or class that is called with the arguments.
        arguments: Keyword arguments.
        kind: Value of `data.partition.kind`, for error messages.
        filled: Number of leading positional arguments that are provided otherwise.
        provided: Names of other arguments that are provided otherwise.

    Raises:
        UserError: If an argument is unknown, or a required argument is missing.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        # Some functions that are written in C have no signature.
        return
    leading = [p for p in parameters if p.kind in _POSITIONAL][:filled]
    named = {
        p.name: p
        for p in parameters
        if p not in leading and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for name in arguments:
            if name not in named:
                hint = suggest_or_list(name, named) or f"; {kind} takes no arguments"
                raise UserError(f"{WHERE}.{name}: unknown argument of {kind}{hint}")
    for name, parameter in named.items():
        if parameter.default is parameter.empty and name not in {*arguments, *provided}:
            raise UserError(f"{WHERE}.{name}: missing; {kind} needs this argument")


def check_parts(parts: object, context: PartitionContext, where: str) -> list[Tensor]:
    """Check the result of a partition function and return the sorted rows of each client.

    Args:
        parts: Result of the function.
        context: Inputs of the function.
        where: Prefix of error messages.

    Raises:
        UserError: If the result is not one list of row indices per client, or a row occurs twice.
    """
    clients = len(context.share)
    rows = context.num_rows
    if not isinstance(parts, list | tuple) or len(parts) != clients:
        found = f"{len(parts)} parts" if isinstance(parts, list | tuple) else type(parts).__name__
        raise UserError(
            f"{where}: expected a list with the rows of each of {clients} clients, got {found}"
        )
    tensors = [_row_indices(part, where).sort().values for part in parts]
    all_rows = torch.cat(tensors)
    if len(all_rows) and (all_rows.min() < 0 or all_rows.max() >= rows):
        raise UserError(
            f"{where}: expected row indices from 0 to {rows - 1}, got {all_rows.min()} to "
            f"{all_rows.max()}"
        )
    if len(all_rows.unique()) < len(all_rows):
        raise UserError(f"{where}: expected each row at most once, got a row twice")
    return tensors


def _row_indices(part: Any, where: str) -> Tensor:
    try:
        rows = torch.as_tensor(part)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{where}: expected row indices as integers: {one_line(error)}") from error
    if rows.numel() and (rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool):
        raise UserError(f"{where}: expected row indices as integers, got {dtype_name(rows)}")
    return rows.reshape(-1).to(torch.int64)


def check_min_size(parts: Sequence[Tensor], config: PartitionConfig) -> None:
    """Check that each client has at least `config.min_size` rows.

    Raises:
        UserError: If a client has fewer rows.
    """
    smallest = min(map(len, parts))
    if smallest < config.min_size:
        raise UserError(
            f"{WHERE}.kind: {config.kind}: assigns only {pluralize(smallest, 'row')} to a "
            "client; "
            f"{WHERE}.min_size is {config.min_size}"
        )


def takes_six_arguments(partition: UserPartition) -> bool:
    """Return whether a function takes the arguments that preceded `PartitionContext`.

    These are the functions with six positional arguments, or with any number of them.
    """
    if isinstance(partition, type):
        return False
    try:
        parameters = inspect.signature(partition).parameters.values()
    except (TypeError, ValueError):
        return False
    required = [p for p in parameters if p.kind in _POSITIONAL and p.default is p.empty]
    return len(required) == 6 or any(p.kind is p.VAR_POSITIONAL for p in parameters)


def legacy_partition(
    partition: UserPartition,
    context: PartitionContext,
    sizes: Sequence[float],
    patient: Tensor | None,
) -> list[Tensor]:
    """Call a partition function that takes the arguments `SIX_ARGUMENTS`.

    Args:
        partition: The function.
        context: Inputs of the partition.
        sizes: Relative size of each client.
        patient: Patient of each row, int64 `[N]`, or None.

    Returns:
        Sorted row indices of each client.

    Raises:
        UserError: If the function raises an error, the result is not a partition, or the rows of a
            patient are divided.
    """
    kind = context.config.kind
    where = f"{WHERE}.kind: {kind}"
    message = (
        f"{where}: functions of ({SIX_ARGUMENTS}) are deprecated; define a function of a "
        "PartitionContext"
    )
    warnings.warn(message, DeprecationWarning, stacklevel=2)
    context.notes.append(message)
    given = dict(context.config.arguments or {})
    config = context.config.model_copy(update={"alpha": given.pop("alpha", 0.5), "arguments": None})
    if given:
        raise UserError(
            f"{WHERE}.{next(iter(given))}: unknown argument of {kind}; a function of "
            f"({SIX_ARGUMENTS}) takes no arguments"
        )
    arguments = (context.labels, context.group, config, sizes, context.task, context.seed)
    try:
        found = partition(*arguments)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    # A user's function may raise any exception, or call sys.exit.
    except (Exception, SystemExit) as error:
        raise UserError(f"{where} raised {_describe(error)}") from error
    parts = check_parts(found, context, where)
    if patient is not None and (pair := split_patient_rows(parts, patient)) is not None:
        raise UserError(
            f"{where}: assigns rows {pair[0]} and {pair[1]} of the same patient (data.patient) to "
            "different clients"
        )
    return parts


def flower_partition(context: PartitionContext) -> list[Tensor]:
    """Partition rows with a partitioner of `flwr-datasets`, selected as `flwr:NAME`.

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
    partitioner_class = _find_partitioner(kind)
    arguments = _partitioner_arguments(partitioner_class, context)
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


def _find_partitioner(kind: str) -> type[Any]:
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


def _partitioner_arguments(
    partitioner_class: type[Any], context: PartitionContext
) -> dict[str, Any]:
    """Return the checked arguments of a partitioner, with defaults from the run."""
    kind = context.config.kind
    given = dict(context.config.arguments or {})
    check_arguments(partitioner_class, given, kind, provided=_FILLED_BY_RUN)
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
            given[name] = _float_array(value, name)
    filled = {
        "num_partitions": clients,
        "seed": stream_key("data", context.seed, "partition", "flwr"),
        "min_partition_size": context.min_rows,
    }
    accepted = inspect.signature(partitioner_class).parameters
    return {name: filled[name] for name in _FILLED_BY_RUN if name in accepted} | given


def _float_array(value: Any, name: str) -> np.ndarray:
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
