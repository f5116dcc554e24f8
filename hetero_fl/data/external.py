"""The proxy set, and data from outside the common source: clients' own files, external proxy sets.

Own files are matched to the common columns and classes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from hetero_fl.config.clients import PreprocessConfig
from hetero_fl.config.data import DataConfig, SourceConfig, TextConfig
from hetero_fl.config.population import Population, SettingsProfile
from hetero_fl.core.task import Task
from hetero_fl.data.arrays import read_images
from hetero_fl.data.dataset import (
    Block,
    Categories,
    Dataset,
    Examples,
    RowSelection,
    Vocabulary,
    first_true,
    spans_of,
)
from hetero_fl.data.partition import assign_rows
from hetero_fl.data.preprocessing import check_same_shape, raw_shape, required_columns
from hetero_fl.data.registry import load_source, reads_key
from hetero_fl.data.sources.images import image_files, read_image_files
from hetero_fl.data.splits import Splits, draw_rows, holdout_strategy
from hetero_fl.utils.code_permission import OWN
from hetero_fl.utils.errors import UserError, check_names, suggest_or_list
from hetero_fl.utils.seeding import keyed_generator, stream_key

# Other sets matched to the common one: classes, columns, blocks.

NONE = "none of that name"
TOKENS = "give both the same `text` (length, tokenizer, vocabulary, public)"


def match_to_common(
    own: Dataset,
    common: Dataset,
    where: str,
    needed: Collection[str] | None = None,
    owner: str = "",
) -> Examples:
    """Return the training rows of a client's own set with the common set's classes and columns.

    Named classes and columns are matched by name, unnamed ones by number. A client may lack
    classes, and columns that are not needed.

    Args:
        own: The client's own set.
        common: The common set.
        where: The own set's place in the configuration, for messages.
        needed: Columns or blocks that the own set may not lack; None: all of them.
        owner: What has the columns of the common set, in messages; empty: the common set.

    Raises:
        UserError: Another kind of task, or a class or a column that only one of the two has.
    """
    y = match_labels(own, common, where)
    if own.blocks or common.blocks:
        return replace(
            own.train,
            x=match_blocks(own.train.x, own.blocks, common, f"{where}: {own.name}", needed),
            y=y,
        )
    if any(pair not in common.categories for pair in own.categories):
        raise UserError(
            f"{where}.categories: {own.name} encodes other values than the common set {common.name}; set data.categories alone"
        )
    place = f"{where}: {own.name}"
    x, extra = match_columns(own.train.x, own.columns, common, place, needed, owner)
    detail = f", the common set {common.name} has {NONE}"
    check_names(extra, common.columns, f"{place} has column", detail)
    return replace(own.train, x=x, y=y)


def match_labels(own: Dataset, common: Dataset, where: str) -> Tensor:
    """Return the targets of a set's training rows, with classes numbered as the common set's are.

    Raises:
        UserError: Another vocabulary, another kind of task, or a class that the common set lacks.
    """
    mine = own.task
    ours = common.task
    both = f"the common set {common.name} has"
    if own.vocabulary != common.vocabulary:
        raise UserError(
            f"{where}: {own.name} has another vocabulary than the common set {common.name}: {TOKENS}"
        )
    if mine.kind != ours.kind:
        raise UserError(f"{where}: {own.name} is {mine.kind}, {both} a {ours.kind} task")
    y = own.train.labels
    if mine.kind == "multiclass" and mine.names and ours.names:
        check_names(mine.names, ours.names, f"{where}: {own.name} has class", f", {both} {NONE}")
        y = torch.tensor([ours.names.index(name) for name in mine.names])[y]
    elif ours.numbers and not mine.names:
        y = classes_from_labels(y, ours, f"{where}: {own.name}")
    elif mine.outputs != ours.outputs and (
        mine.names or mine.kind != "multiclass" or mine.outputs > ours.outputs
    ):
        noun = "classes" if mine.kind == "multiclass" else "targets"
        raise UserError(f"{where}: {own.name} has {mine.outputs} {noun}, {both} {ours.outputs}")
    elif mine.kind != "multiclass" and mine.names and ours.names and mine.names != ours.names:
        raise UserError(
            f"{where}: {own.name} has targets {', '.join(mine.names)}, {both} {', '.join(ours.names)}"
        )
    return y


def classes_from_labels(y: Tensor, task: Task, where: str) -> Tensor:
    """Return the classes of a task that are named after these integer labels.

    Raises:
        UserError: A label that no class is named after.
    """
    numbers = torch.tensor(task.numbers)
    if (row := first_true(~torch.isin(y, numbers))) is not None:
        raise UserError(
            f"{where}: found label {int(y[row])} in row {row}{suggest_or_list(int(y[row]), task.names)}"
        )
    return (y[:, None] == numbers).to(torch.uint8).argmax(1)


def source_with_task(
    source: SourceConfig, task: Task, text: TextConfig | None = None, categories: Categories = ()
) -> SourceConfig:
    """Return a source with the settings of the common one that it leaves open.

    A table is read for the common task (one file of a federation may hold two of many classes, or
    whole numbers by chance), and its text columns are encoded by the common categories. Texts are
    cut and numbered as the others' are.

    Args:
        source: The source as it is written.
        task: The common task.
        text: The common settings of texts.
        categories: The common categories.
    """
    if reads_key(source.name, "text") and source.text is None:
        return source.model_copy(update={"text": text})
    if source.name != "table":
        return source
    common = {"task": task.kind, "categories": dict(categories)}
    return source.model_copy(
        update={key: value for key, value in common.items() if getattr(source, key) is None}
    )


def match_columns(
    x: Tensor,
    found: tuple[str, ...],
    common: Dataset,
    where: str,
    needed: Collection[str] | None = None,
    owner: str = "",
) -> tuple[Tensor, list[str]]:
    """Return the columns of the common set, in its order, and the names of those that it lacks.

    Columns lie along the last axis; unnamed ones stay as they are. A missing column is NaN. A
    missing indicator whose text column is there is 0: every row has another value.

    Args:
        x: Examples, shape `[..., columns]`.
        found: The names of their columns.
        common: The common set.
        where: What the examples are called in messages.
        needed: Columns that may not be missing; None: all of them.
        owner: What has the columns of the common set, in messages; empty: the common set.

    Raises:
        UserError: If a needed column is missing.
    """
    if not found or not common.columns:
        return x, []
    encoded = common.layout.encoded_columns
    known = tuple(f"{column}=" for column, _ in common.categories)
    there = {encoded[name] for name in found if name in encoded}
    absent = [
        name for name in common.columns if name not in found and encoded.get(name) not in there
    ]
    for name in absent:
        column = encoded.get(name, name)
        if needed is None or name in needed or column in needed:
            owner = owner or f"the common set {common.name}"
            raise UserError(
                f"{where} has no column '{column}', {owner} has{suggest_or_list(column, found)}"
            )
    gap = x.new_full((*x.shape[:-1], 1), torch.nan)
    x = torch.cat([x, gap, torch.zeros_like(gap)], -1) if set(common.columns) - set(found) else x
    places = [
        found.index(n) if n in found else len(found) + (n not in absent) for n in common.columns
    ]
    return x[..., places], [
        name for name in found if name not in common.columns and not name.startswith(known)
    ]


def match_blocks(
    x: Tensor,
    found: tuple[Block, ...],
    common: Dataset,
    where: str,
    needed: Collection[str] | None = None,
) -> Tensor:
    """Return rows of the common set's blocks, shape `[N, D]`.

    Blocks are matched by name; a missing one is NaN. A set without blocks whose examples have the
    shape of one block is that block.

    Args:
        x: Examples.
        found: Their blocks.
        common: The common set.
        where: What the examples are called in messages.
        needed: Blocks that may not be missing; None: all of them.

    Raises:
        UserError: If a needed block is missing, a block has another shape, or the common set lacks
            a block.
    """
    if not found:
        if tuple(x.shape[1:]) == tuple(common.train.x.shape[1:]):
            return x
        alike = [b for b in common.blocks if b.shape == tuple(x.shape[1:])]
        found = tuple(alike[:1])
        x = (x.float() / 255 if x.dtype == torch.uint8 else x).flatten(1)
        if len(alike) != 1:
            known = ", ".join(f"{b.name} {b.shape}" for b in common.blocks)
            raise UserError(
                f"{where}: examples are no block of {common.name}, which has {known or 'none'}"
            )
    given = {
        b.name: x[:, start:stop] for b, (start, stop) in zip(found, spans_of(found), strict=True)
    }
    ours = {b.name: b.shape for b in common.blocks}
    for name, shape in found:
        if ours.get(name) != shape:
            hint = (
                f"; there it has shape {ours[name]}"
                if name in ours
                else suggest_or_list(name, ours)
            )
            raise UserError(
                f"{where} has block '{name}' of shape {shape}, the common set {common.name} has none{hint}"
            )
    wanted = [name for name in ours if needed is None or name in needed]
    check_names(wanted, given, f"{where} has no block", f", the common set {common.name} has")
    return torch.cat(
        [given.get(b.name, x.new_full((len(x), b.size), torch.nan)) for b in common.blocks], 1
    )


def load_unlabelled(
    config: SourceConfig, root: Path, where: str, vocabulary: Vocabulary | None = None
) -> tuple[Tensor, tuple[str, ...], tuple[Block, ...]]:
    """Return the training examples of a source, the names of its columns, and its blocks.

    Values may be missing (NaN). No label leaves this function, and local files need none: an .npz
    with `train_images` alone, a table without `label`, a folder of loose images.

    Args:
        config: The source.
        root: The folder for downloads.
        where: The source's place in the configuration, for messages.
        vocabulary: The vocabulary that the examples have to share.

    Raises:
        UserError: See `load_source`; or the source has another vocabulary.
    """
    try:
        loose = _load_unlabelled_file(config)
    except UserError as error:
        raise UserError(f"{where}.{error}") from error
    if loose is None:
        dataset = load_source(config, root, where, missing=True)
        if dataset.vocabulary != vocabulary:
            raise UserError(
                f"{where}: {config.name} has another vocabulary than the common set: {TOKENS}"
            )
        return dataset.train.x, dataset.columns, dataset.blocks
    if vocabulary is not None:
        raise UserError(
            f"{where}.path: {config.path} holds no text, and the common set's examples are tokens"
        )
    x, columns = loose
    if bool(torch.isinf(x).any()) or (x.ndim > 2 and bool(torch.isnan(x).any())):
        raise UserError(f"{where}.path: {config.path}: NaN or infinity among the examples")
    return x, columns, ()


def _load_labeled(
    config: SourceConfig, root: Path, where: str, common: Dataset
) -> tuple[Dataset, Tensor]:
    """Load a public set, and its labels as the common set numbers them."""
    try:
        own = load_source(config, root, where, missing=True)
        return own, match_labels(own, common, where)
    except UserError as error:
        raise UserError(f"data.proxy.labels: found true, but {error}") from error


def _load_unlabelled_file(config: SourceConfig) -> tuple[Tensor, tuple[str, ...]] | None:
    """Return the examples and columns of a file or folder without labels; None for other sources."""
    if config.path is None or config.name.startswith(OWN):
        return None
    path = Path(config.path).expanduser()
    if path.suffix == ".npz":
        return read_images(path), ()
    if config.name == "table" and config.label is None:
        # as in `table`: only then is pandas loaded
        from hetero_fl.data.sources.table_files import decimal_commas, features, read_frame

        categories = config.categories or {}
        frame, _ = decimal_commas(read_frame(path, categories), f"path: {path}", categories)
        x, columns, _ = features(frame, f"path: {path}", [], categories)
        return x, columns
    if (
        config.name == "image_folder"
        and (files := image_files(path))
        and all(f.parent == path for f in files)
    ):
        return read_image_files(files, config.size), ()
    return None


# The proxy set: held out of the training rows, or loaded from a source of its own.

PROXY_COLUMNS = "data.proxy.columns"


def proxy_set(
    dataset: Dataset,
    config: DataConfig,
    rows: Tensor,
    kinds: Sequence[SettingsProfile],
    server: PreprocessConfig | None,
    seed: int,
) -> tuple[dict[str, RowSelection], Tensor]:
    """Return the proxy set, if there is one, and the training rows that are left.

    It has labels only where the configuration asks for them; which rows it takes depends on none.

    Args:
        dataset: The common data set.
        config: The data's configuration.
        rows: The training rows that are kept, int64 `[M]`.
        kinds: The profiles of the clients that see the proxy set.
        server: How the server sees examples, if it has a model of its own.
        seed: The run's seed.
    """
    draws = keyed_generator("data", seed, "proxy")
    if config.proxy.source is not None:
        proxy = _load_proxy_set(config.proxy.source, dataset, config, kinds, server, draws)
    elif config.proxy.size > 0:
        proxy, rows = _hold_out(dataset, config, rows, draws)
    else:
        return {}, rows
    return {"proxy": proxy}, rows


def _hold_out(
    dataset: Dataset, config: DataConfig, rows: Tensor, draws: torch.Generator
) -> tuple[RowSelection, Tensor]:
    """Draw the proxy set among the training rows that have something of each public column."""
    size = config.proxy.size
    names = config.proxy.columns
    train = dataset.train
    having = (
        rows
        if names is None
        else rows[dataset.layout.has_values(train.x[rows], names, PROXY_COLUMNS)]
    )
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
    public = dataset.layout.keep_columns(train.x[held], names, PROXY_COLUMNS)
    return RowSelection.all_rows(Examples(public, None if y is None else y[held])), rows


def _load_proxy_set(
    source: SourceConfig,
    dataset: Dataset,
    config: DataConfig,
    kinds: Sequence[SettingsProfile],
    server: PreprocessConfig | None,
    draws: torch.Generator,
) -> RowSelection:
    """Load a proxy set from its own source and match it to the common set."""
    where = "data.proxy.source"
    size = config.proxy.size
    read = source_with_task(source, dataset.task, config.text, dataset.categories)
    root = Path(config.root).expanduser()
    y: Tensor | None = None
    if config.proxy.labels:
        own, y = _load_labeled(read, root, where, dataset)
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
        x = dataset.layout.keep_columns(x, config.proxy.columns, PROXY_COLUMNS)
    clients = {kind.first: kind.settings for kind in kinds}
    check_same_shape(tuple(x.shape[1:]), where, source.name, clients, dataset, server)
    proxy = RowSelection.all_rows(Examples(x, y))
    if 0 < size < len(x):
        proxy = RowSelection(proxy.examples, draw_rows(proxy.rows, size, draws)[0])
    return proxy


# Clients with a source of their own: who they are, and which of its rows each has.


@dataclass
class ClientSources:
    """Rows of clients with own sources, notes on how they were read, and whether one is generated."""

    private: dict[str, Splits]
    notes: list[str]
    simulated: bool


def clients_by_source(config: DataConfig, clients: Population) -> dict[SourceConfig, list[str]]:
    """Return the clients of each source that clients name as their own."""
    holders: dict[SourceConfig, list[str]] = {}
    named = any(kind.settings.data is not None for kind in clients.profiles)
    for name in clients.ids if named else ():
        source = clients[name].data
        if source is not None:
            if (source.name, source.path) == (config.name, config.path):
                raise UserError(
                    f"clients: '{name}': data: found the common source; leave it out to get a part of that"
                )
            holders.setdefault(source, []).append(name)
    return holders


def load_client_sources(
    holders_of: Mapping[SourceConfig, list[str]],
    common: Dataset,
    config: DataConfig,
    clients: Population,
    seed: int,
) -> ClientSources:
    """Load each source, match it to the common set, and partition it among those that name it.

    Args:
        holders_of: The clients of each source.
        common: The common data set.
        config: The data's configuration.
        clients: Settings by client.
        seed: The run's seed.

    Raises:
        UserError: If a source does not match the common set, or several clients share one in a
            partition that draws.
    """
    found = ClientSources({}, [], False)
    for source, holders in holders_of.items():
        where = f"clients: '{holders[0]}': data"
        read = source_with_task(source, common.task, config.text, common.categories)
        root = Path(config.root).expanduser()
        own = load_source(read, root, where, missing=True)
        found.simulated |= own.simulated
        found.notes += [f"{where}: {note}" for note in own.notes]
        seen = required_columns((clients[name] for name in holders), common.layout)
        adopted = Dataset(
            own.name, common.task, match_to_common(own, common, where, seen), span=own.span
        )
        for name in holders:
            check_same_shape(
                raw_shape(adopted),
                f"clients: '{name}': data",
                own.name,
                {name: clients[name]},
                common,
            )
        everything = RowSelection.all_rows(adopted.train)
        if len(holders) > 1:
            if config.partition.kind == "drawn":
                raise UserError(
                    f"data.partition.kind: drawn draws from the common set, and {source.name} is "
                    f"the own source of {len(holders)} clients; give it to one of them, or take "
                    "another kind"
                )
            # A key of its own: holders of two sources would otherwise get the same mix of classes.
            own_seed = stream_key("data", seed, "own source", source.name, source.path or "")
            shares = assign_rows(
                adopted, everything.rows, holders, config, clients, own_seed, found.notes
            )
        else:
            # All rows of its own source are the client's, whatever groups are in it.
            shares = {holders[0]: everything}
        kept = holdout_strategy(own).sets_of_own_source() if len(holders) == 1 else {}
        if not kept:
            found.private |= holdout_strategy(adopted).split_clients(shares, {}, config, seed)
            continue
        splits = {"train": everything}
        for name, part in kept.items():
            matched = match_to_common(replace(own, train=part), common, where, seen)
            splits[name] = RowSelection.all_rows(matched)
        found.private[holders[0]] = splits
    return found
