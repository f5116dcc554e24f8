"""What all participants have in common: the proxy set, and the common validation and test sets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from hetero_fl.config.clients import PreprocessConfig
from hetero_fl.config.data import DataConfig, SourceConfig
from hetero_fl.config.population import Kind
from hetero_fl.data.dataset import Dataset, Examples, Layout, Share
from hetero_fl.data.external import (
    limited,
    load_labeled,
    load_unlabelled,
    match_blocks,
    match_columns,
    read_as,
)
from hetero_fl.data.preprocessing import check_alike, needed
from hetero_fl.data.splits import Apart, draw
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.seeding import generator

COLUMNS = "data.proxy.columns"


def common_sets(
    dataset: Dataset, config: DataConfig, rows: Tensor, apart: Apart, seed: int
) -> tuple[dict[str, Share], Tensor]:
    """The common validation and test sets, and the training rows (of `rows`, int64 `[M]`) that are left."""
    assert dataset.test is not None
    if dataset.validation is not None:
        validation = Share.whole(dataset.validation)
    elif config.validation:
        held, rows = apart.validation(rows, config.validation, seed)
        validation = Share(dataset.train, held)
    else:
        validation = Share(dataset.train, rows[:0])
    test = Share.whole(dataset.test)
    # the same rows for all seeds
    if config.test_limit is not None and config.test_limit < len(test.rows):
        test = Share(
            dataset.test,
            draw(test.rows, config.test_limit, generator("data", dataset.name, "test_limit"))[0],
        )
    return {"common_validation": validation, "common_test": test}, rows


def proxy_set(
    dataset: Dataset,
    config: DataConfig,
    rows: Tensor,
    kinds: Sequence[Kind],
    server: PreprocessConfig | None,
    seed: int,
) -> tuple[dict[str, Share], Tensor]:
    """The proxy set, if there is one, and the training rows (of `rows`, int64 `[M]`) that are left. It has labels only where
    the configuration asks for them, and which rows it takes depends on none."""
    draws = generator("data", seed, "proxy")
    if config.proxy.source is not None:
        return {
            "proxy": _from_elsewhere(config.proxy.source, dataset, config, kinds, server, draws)
        }, rows
    if config.proxy.size == 0:
        return {}, rows
    proxy, rest = _held_out(dataset, config, rows, draws)
    return {"proxy": proxy}, rest


def _held_out(
    dataset: Dataset, config: DataConfig, rows: Tensor, draws: torch.Generator
) -> tuple[Share, Tensor]:
    """Drawn among the training rows that have something of each public column."""
    size, names, train = config.proxy.size, config.proxy.columns, dataset.train
    having = rows if names is None else rows[_with(train.x[rows], names, dataset.layout)]
    if size >= len(having):
        what = "" if names is None else f" with {' and '.join(names)}"
        raise UserError(
            f"data.proxy.size: found {size}, but {dataset.name} has {len(having)} training rows{what}; take fewer"
        )
    held, rest = draw(having, size, draws, train.patient)
    y = train.y if config.proxy.labels else None
    if names is None:
        return Share(Examples(train.x, y), held), rest
    rows = rows[~torch.isin(rows, held)]
    if train.patient is not None:
        rows = rows[~torch.isin(train.patient[rows], train.patient[held])]
    public = limited(train.x[held], names, dataset.layout, COLUMNS)
    return Share.whole(Examples(public, None if y is None else y[held])), rows


def _from_elsewhere(
    source: SourceConfig,
    dataset: Dataset,
    config: DataConfig,
    kinds: Sequence[Kind],
    server: PreprocessConfig | None,
    draws: torch.Generator,
) -> Share:
    """Loaded from a source of its own, and matched to the common set; all of it, or as many rows as are asked for."""
    where, size = "data.proxy.source", config.proxy.size
    read = read_as(source, dataset.task, config.text, dataset.categories)
    root = Path(config.root).expanduser()
    y: Tensor | None = None
    if config.proxy.labels:
        own, y = load_labeled(read, root, where, dataset)
        x, columns, blocks = own.train.x, own.columns, own.blocks
    else:
        x, columns, blocks = load_unlabelled(read, root, where, dataset.vocabulary)
    name = f"{where}: {source.name}"
    if blocks or dataset.blocks:
        x = match_blocks(x, blocks, dataset, name, ())  # who sees nothing of it has no part in it
    else:
        x, _ = match_columns(
            x, columns, dataset, name, needed((k.settings for k in kinds), dataset.layout)
        )
    if config.proxy.columns is not None:
        x = limited(x, config.proxy.columns, dataset.layout, COLUMNS)
    clients = {kind.first: kind.settings for kind in kinds}
    check_alike(tuple(x.shape[1:]), where, source.name, clients, dataset, server)
    proxy = Share.whole(Examples(x, y))
    return Share(proxy.examples, draw(proxy.rows, size, draws)[0]) if 0 < size < len(x) else proxy


def _with(x: Tensor, names: list[str], layout: Layout) -> Tensor:
    """bool `[N]`: rows of which something is there of each of these columns or blocks."""
    found = torch.ones(len(x), dtype=torch.bool)
    for name in names:
        for start, stop in layout.spans([name], COLUMNS):
            found &= ~x[..., start:stop].isnan().flatten(1).all(1)
    return found
