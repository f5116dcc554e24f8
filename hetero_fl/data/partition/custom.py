"""Partitions by code of users, with checks of arguments and results."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hetero_fl.config.data import PartitionConfig
from hetero_fl.core.images import dtype_name
from hetero_fl.data.partition.context import PartitionContext
from hetero_fl.data.partition.groups import WHERE
from hetero_fl.utils.errors import UserError, one_line, suggest_or_list
from hetero_fl.utils.text import pluralize

UserPartition = Callable[..., Any]
"""A function of a `PartitionContext`, or a subclass of `Partitioner`."""
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


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
    function: Callable[..., Any], arguments: Mapping[str, Any], kind: str, *, filled: int
) -> None:
    """Check the names of the arguments of a partition, which are keys of `data.partition`.

    Args:
        function: Function or class that is called with the arguments.
        arguments: Keyword arguments.
        kind: Value of `data.partition.kind`, for error messages.
        filled: Number of leading positional arguments that are provided otherwise.

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
        if parameter.default is parameter.empty and name not in arguments:
            raise UserError(
                f"{WHERE}.{name}: missing; {kind} needs this argument (a partition is a function "
                "of a PartitionContext and of its settings)"
            )


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
