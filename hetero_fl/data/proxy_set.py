"""What all participants have in common: the proxy set, and the common validation and test sets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from hetero_fl.config.clients import PreprocessConfig
from hetero_fl.config.data import DataConfig, SourceConfig
from hetero_fl.config.population import SettingsProfile
from hetero_fl.data.dataset import ColumnLayout, Dataset, Examples, RowSelection
from hetero_fl.data.external import (
    keep_columns,
    load_labeled,
    load_unlabelled,
    match_blocks,
    match_columns,
    source_with_task,
)
from hetero_fl.data.preprocessing import check_same_shape, required_columns
from hetero_fl.data.splits import HoldoutStrategy, draw_rows
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.seeding import keyed_generator

COLUMNS = "data.proxy.columns"


def common_sets(
    dataset: Dataset, config: DataConfig, rows: Tensor, strategy: HoldoutStrategy, seed: int
) -> tuple[dict[str, RowSelection], Tensor]:
    """The common validation and test sets, and the training rows (of `rows`, int64 `[M]`) that are left."""
    assert dataset.test is not None
    if dataset.validation is not None:
        validation = RowSelection.all_rows(dataset.validation)
    elif config.validation:
        held, rows = strategy.split_validation(rows, config.validation, seed)
        validation = RowSelection(dataset.train, held)
    else:
        validation = RowSelection(dataset.train, rows[:0])
    test = RowSelection.all_rows(dataset.test)
    # the same rows for all seeds
    if config.test_limit is not None and config.test_limit < len(test.rows):
        test = RowSelection(
            dataset.test,
            draw_rows(
                test.rows, config.test_limit, keyed_generator("data", dataset.name, "test_limit")
            )[0],
        )
    return {"common_validation": validation, "common_test": test}, rows


def proxy_set(
    dataset: Dataset,
    config: DataConfig,
    rows: Tensor,
    kinds: Sequence[SettingsProfile],
    server: PreprocessConfig | None,
    seed: int,
) -> tuple[dict[str, RowSelection], Tensor]:
    """The proxy set, if there is one, and the training rows (of `rows`, int64 `[M]`) that are left. It has labels only where
    the configuration asks for them, and which rows it takes depends on none."""
    draws = keyed_generator("data", seed, "proxy")
    if config.proxy.source is not None:
        return {
            "proxy": _load_external(config.proxy.source, dataset, config, kinds, server, draws)
        }, rows
    if config.proxy.size == 0:
        return {}, rows
    proxy, rest = _hold_out(dataset, config, rows, draws)
    return {"proxy": proxy}, rest


def _hold_out(
    dataset: Dataset, config: DataConfig, rows: Tensor, draws: torch.Generator
) -> tuple[RowSelection, Tensor]:
    """Drawn among the training rows that have something of each public column."""
    size = config.proxy.size
    names = config.proxy.columns
    train = dataset.train
    having = rows if names is None else rows[_has_values(train.x[rows], names, dataset.layout)]
    if size >= len(having):
        what = "" if names is None else f" with {' and '.join(names)}"
        raise UserError(
            f"data.proxy.size: found {size}, but {dataset.name} has {len(having)} training rows{what}; take fewer"
        )
    held, rest = draw_rows(having, size, draws, train.patient)
    y = train.y if config.proxy.labels else None
    if names is None:
        return RowSelection(Examples(train.x, y), held), rest
    rows = rows[~torch.isin(rows, held)]
    if train.patient is not None:
        rows = rows[~torch.isin(train.patient[rows], train.patient[held])]
    public = keep_columns(train.x[held], names, dataset.layout, COLUMNS)
    return RowSelection.all_rows(Examples(public, None if y is None else y[held])), rows


def _load_external(
    source: SourceConfig,
    dataset: Dataset,
    config: DataConfig,
    kinds: Sequence[SettingsProfile],
    server: PreprocessConfig | None,
    draws: torch.Generator,
) -> RowSelection:
    """Loaded from a source of its own, and matched to the common set; all of it, or as many rows as are asked for."""
    where = "data.proxy.source"
    size = config.proxy.size
    read = source_with_task(source, dataset.task, config.text, dataset.categories)
    root = Path(config.root).expanduser()
    y: Tensor | None = None
    if config.proxy.labels:
        own, y = load_labeled(read, root, where, dataset)
        x = own.train.x
        columns = own.columns
        blocks = own.blocks
    else:
        x, columns, blocks = load_unlabelled(read, root, where, dataset.vocabulary)
    name = f"{where}: {source.name}"
    if blocks or dataset.blocks:
        x = match_blocks(x, blocks, dataset, name, ())  # who sees nothing of it has no part in it
    else:
        x, _ = match_columns(
            x, columns, dataset, name, required_columns((k.settings for k in kinds), dataset.layout)
        )
    if config.proxy.columns is not None:
        x = keep_columns(x, config.proxy.columns, dataset.layout, COLUMNS)
    clients = {kind.first: kind.settings for kind in kinds}
    check_same_shape(tuple(x.shape[1:]), where, source.name, clients, dataset, server)
    proxy = RowSelection.all_rows(Examples(x, y))
    return (
        RowSelection(proxy.examples, draw_rows(proxy.rows, size, draws)[0])
        if 0 < size < len(x)
        else proxy
    )


def _has_values(x: Tensor, names: list[str], layout: ColumnLayout) -> Tensor:
    """bool `[N]`: rows of which something is there of each of these columns or blocks."""
    found = torch.ones(len(x), dtype=torch.bool)
    for name in names:
        for start, stop in layout.spans([name], COLUMNS):
            found &= ~x[..., start:stop].isnan().flatten(1).all(1)
    return found
