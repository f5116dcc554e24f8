"""Data from outside the common source: clients' own files and an external proxy set.

Own files are matched to the common columns and classes, or pooled without a common source.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from hetero_fl.config.clients import ClientSettings
from hetero_fl.config.data import DataConfig, SourceConfig, TextConfig
from hetero_fl.config.population import Population
from hetero_fl.core.task import Task
from hetero_fl.data.arrays import read_images
from hetero_fl.data.dataset import (
    Block,
    Categories,
    ColumnLayout,
    Dataset,
    Examples,
    RowSelection,
    Vocabulary,
    index_names,
    spans_of,
)
from hetero_fl.data.partition import assign_rows
from hetero_fl.data.preprocessing import check_same_shape, raw_shape, required_columns
from hetero_fl.data.registry import load_source, needs_path, reads_key
from hetero_fl.data.sources.images import image_files, read_image_files
from hetero_fl.data.splits import Splits, holdout_strategy
from hetero_fl.utils.code_permission import OWN
from hetero_fl.utils.errors import UserError, suggest_or_list
from hetero_fl.utils.ordering import natural_order
from hetero_fl.utils.seeding import stream_key

# Data from outside the common source: a client's own set, a public proxy set; matched to what all
# have in common.

TOKENS = "give both the same `text` (length, tokenizer, vocabulary, public)"


def match_to_common(
    own: Dataset, common: Dataset, where: str, needed: Collection[str] | None = None
) -> Examples:
    """The training rows of a client's own set, with the classes and the columns numbered as the common set's are.

    Named classes and columns are matched by name, and a client may lack classes; unnamed ones are matched by number. It may
    also lack columns that are not `needed` (none: all are).

    Raises:
        UserError: another kind of task, a class or a column that only one of the two has.
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
    x, extra = match_columns(own.train.x, own.columns, common, f"{where}: {own.name}", needed)
    if extra:
        none = f"the common set {common.name} has none of that name"
        raise UserError(
            f"{where}: {own.name} has column '{extra[0]}', {none}{suggest_or_list(extra[0], common.columns)}"
        )
    return replace(own.train, x=x, y=y)


def match_labels(own: Dataset, common: Dataset, where: str) -> Tensor:
    """Return the targets of a set's training rows, with classes numbered as the common set's are.

    Raises:
        UserError: Another vocabulary, another kind of task, or a class that the common set lacks.
    """
    mine = own.task
    ours = common.task
    both = f"the common set {common.name} has"
    none = f"{both} none of that name"
    if own.vocabulary != common.vocabulary:
        raise UserError(
            f"{where}: {own.name} has another vocabulary than the common set {common.name}: {TOKENS}"
        )
    if mine.kind != ours.kind:
        raise UserError(f"{where}: {own.name} is {mine.kind}, {both} a {ours.kind} task")
    y = own.train.labels
    if mine.kind == "multiclass" and mine.names and ours.names:
        for name in mine.names:
            if name not in ours.names:
                raise UserError(
                    f"{where}: {own.name} has class '{name}', {none}{suggest_or_list(name, ours.names)}"
                )
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
    known = torch.isin(y, numbers)
    if not bool(known.all()):
        row = int((~known).to(torch.uint8).argmax())
        raise UserError(
            f"{where}: found label {int(y[row])} in row {row}{suggest_or_list(int(y[row]), task.names)}"
        )
    return (y[:, None] == numbers).to(torch.uint8).argmax(1)


def source_with_task(
    source: SourceConfig, task: Task, text: TextConfig | None = None, categories: Categories = ()
) -> SourceConfig:
    """Return the source of a table, to be read for the task that the others have, unless it says otherwise: one file of a
    federation may hold two of many classes, or whole numbers by chance. Text columns are encoded by the common `categories`,
    whatever values this file has; texts are cut and numbered as the others' are."""
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
) -> tuple[Tensor, list[str]]:
    """The columns (last axis) of the common set, in its order, and the names of those that it lacks. Unnamed ones stay. A
    column that is missing is NaN; an indicator whose text column is there has another value in every row, and is 0.

    Raises:
        UserError: a column of the common set is missing that is among the `needed` (none: all are).
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
            raise UserError(
                f"{where} has no column '{column}', the common set {common.name} has{suggest_or_list(column, found)}"
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
    """Rows `[N, D]` of the common set's blocks, matched by name; a set without blocks whose examples have the shape of one
    block is that block. A block that is missing is NaN.

    Raises:
        UserError: a block that is `needed` (none: all are) is missing, or has another shape; a block that the common set
            lacks.
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
    shapes = {b.name: b.shape for b in found}
    ours = {b.name: b.shape for b in common.blocks}
    for name, shape in shapes.items():
        if ours.get(name) != shape:
            hint = (
                suggest_or_list(name, ours)
                if name not in ours
                else f"; there it has shape {ours[name]}"
            )
            raise UserError(
                f"{where} has block '{name}' of shape {shape}, the common set {common.name} has none{hint}"
            )
    for name in ours:
        if name not in given and (needed is None or name in needed):
            raise UserError(
                f"{where} has no block '{name}', the common set {common.name} has{suggest_or_list(name, given)}"
            )
    return torch.cat(
        [given.get(b.name, x.new_full((len(x), b.size), torch.nan)) for b in common.blocks], 1
    )


def keep_columns(x: Tensor, names: Sequence[str], layout: ColumnLayout, where: str) -> Tensor:
    """A copy in which only these columns or blocks are left; the others are NaN. Raises UserError for unknown names."""
    public = torch.full_like(x, torch.nan)
    for start, stop in layout.spans(names, where):
        public[..., start:stop] = x[..., start:stop]
    return public


def load_unlabelled(
    config: SourceConfig, root: Path, where: str, vocabulary: Vocabulary | None = None
) -> tuple[Tensor, tuple[str, ...], tuple[Block, ...]]:
    """The training examples of a source, the names of its columns, and its blocks. Values may be missing (NaN). No label
    leaves this function; those of local files need not even be there: an .npz with `train_images` alone, a table without
    `label`, a folder of loose images.

    Raises:
        UserError: see `load_source`; another vocabulary than that one.
    """
    try:
        loose = (
            None
            if config.path is None
            else _load_unlabelled_file(config, Path(config.path).expanduser())
        )
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


def load_labeled(
    config: SourceConfig, root: Path, where: str, common: Dataset
) -> tuple[Dataset, Tensor]:
    """Load a public set whose labels are to be read, and its labels as the common set numbers them.

    Args:
        config: The source of the public set.
        root: The folder for downloads.
        where: The configuration's key of the source, for messages.
        common: The common data set.

    Raises:
        UserError: See `load_source` and `match_labels`; labels are missing or do not match.
    """
    try:
        own = load_source(config, root, where, missing=True)
        return own, match_labels(own, common, where)
    except UserError as error:
        raise UserError(f"data.proxy.labels: found true, but {error}") from error


def _load_unlabelled_file(
    config: SourceConfig, path: Path
) -> tuple[Tensor, tuple[str, ...]] | None:
    """The examples of a local file or folder that needs no labels, or None if it is none of that kind."""
    if config.name.startswith(OWN):
        return None
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


# Clients with a source of their own: who they are, and which of its rows each has.


@dataclass
class ClientSources:
    """The rows of clients with own sources, lines on how these were read, and whether one of them is generated."""

    private: dict[str, Splits]
    notes: list[str]
    simulated: bool


def clients_by_source(config: DataConfig, clients: Population) -> dict[SourceConfig, list[str]]:
    """Clients by the source that they name as their own. They are looked for only where there are any."""
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
    """Load each source, match it to the common set, and deal it out among those that name it.

    Raises:
        UserError: a source that does not match the common set, or that several share in a partition in which nobody is dealt
            any rows.
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
        if len(holders) > 1:
            if config.partition.kind == "drawn":
                raise UserError(
                    f"data.partition.kind: drawn draws from the common set, and {source.name} is the own source of "
                    f"{len(holders)} clients; give it to one of them, or take another kind"
                )
            # keys of its own: holders of two sources would else get the same mix of classes
            own_seed = stream_key("data", seed, "own source", source.name, source.path or "")
            everything = RowSelection.all_rows(adopted.train)
            shares = assign_rows(
                adopted, everything.rows, holders, config, clients, own_seed, found.notes
            )
            found.private |= holdout_strategy(adopted).split_clients(shares, {}, config, seed)
            continue
        # its own file is its own, whatever groups are in it
        share = RowSelection.all_rows(adopted.train)
        kept = {
            name: RowSelection.all_rows(
                match_to_common(replace(own, train=part), common, where, seen)
            )
            for name, part in holdout_strategy(own).sets_of_own_source().items()
        }
        if kept:
            found.private[holders[0]] = {"train": share, **kept}
        else:
            found.private |= holdout_strategy(adopted).split_clients(
                {holders[0]: share}, {}, config, seed
            )
    return found


# A federation without a common file: the files of all clients are pooled, and each gets back what
# is left of its own.
#
# This is the natural partition of one file with a column that says whose row it is. The common test
# set, the common validation set and the proxy set are drawn from all rows by the rules of
# `federate`: keyed by the seed (the test set by the data set's name alone), and whole patients
# where the files name them.

POOLED = ("table", "npz", "image_folder")
# keys of `data` for files that leave them out
SHARED = ("label", "group", "patient", "task", "categories", "size")


def has_common_source(config: DataConfig) -> bool:
    """Return whether the configuration names a common source: a data set by name, or a file."""
    return config.path is not None or not needs_path(config.name)


def pool_client_files(
    config: DataConfig, clients: Population, missing: bool
) -> tuple[Dataset, DataConfig, Mapping[str, ClientSettings]]:
    """Load the files of all clients as one data set whose groups are the clients.

    Args:
        config: The data's configuration, without a common source.
        clients: Settings by client; each has a source of its own.
        missing: Whether values may be missing (NaN).

    Returns:
        The data set, and the configuration and clients with which `federate` deals each client its own rows.

    Raises:
        UserError: A client without a file, two clients of one file, files that do not match.
    """
    sources = _sources(config, clients)
    root = Path(config.root).expanduser()
    if config.name == "table" and config.categories is None:
        from hetero_fl.data.sources.table_files import common_categories  # loads pandas

        categories = common_categories(
            {_config_path(client): source for client, source in sources.items()}
        )
        sources = {c: s.model_copy(update={"categories": categories}) for c, s in sources.items()}
    own = {
        client: load_source(source, root, _config_path(client), missing)
        for client, source in sources.items()
    }
    like = _common_schema(own)
    seen = required_columns((clients[client] for client in own), like.layout)
    parts = {
        client: match_to_common(each, like, _config_path(client), seen)
        for client, each in own.items()
    }
    train = _concatenate(parts)
    notes = [
        f"{_config_path(client)}: {note}" for client, each in own.items() for note in each.notes
    ]
    notes.append(
        f"no data.path: common test, validation and proxy rows are drawn from the files of all {len(own)} clients"
    )
    about = f"{len(train):,} rows of {len(own)} files"
    gap = next((each.min_gap for each in own.values() if each.min_gap), "")
    dataset = replace(like, train=train, about=about, notes=tuple(notes), min_gap=gap)
    partition = config.partition.model_copy(update={"kind": "natural"})
    settings = {client: each.model_copy(update={"data": None}) for client, each in clients.items()}
    return dataset, config.model_copy(update={"partition": partition}), settings


def _sources(config: DataConfig, clients: Population) -> dict[str, SourceConfig]:
    """Return each client's own source, with the keys of `data` that it leaves out."""
    missing = f"data.path: missing; {config.name} reads a local file or folder"
    if config.name not in POOLED:
        raise UserError(f"{missing}; without a common one, data.name is one of {', '.join(POOLED)}")
    if config.partition.kind not in ("iid", "natural"):
        raise UserError(
            f"data.partition.kind: found {config.partition.kind}, but without data.path each client has its own file; "
            "leave it out"
        )
    found: dict[str, SourceConfig] = {}
    owner: dict[str | None, str] = {}
    for client in clients.ids:
        source = clients[client].data
        if source is None:
            raise UserError(
                f"{missing}; without a common one, each client needs its own, but '{client}' has no data"
            )
        if source.name != config.name:
            raise UserError(
                f"{_config_path(client)}.name: found {source.name}, but without data.path all are {config.name}"
            )
        if source.path is not None and source.path in owner:
            raise UserError(
                f"{_config_path(client)}.path: found {source.path}, the file of '{owner[source.path]}'; without data.path each "
                "client has its own"
            )
        if source.categories not in (None, config.categories):
            raise UserError(
                f"{_config_path(client)}.categories: all files are encoded alike; set data.categories instead"
            )
        owner[source.path] = client
        shared = {key: getattr(config, key) for key in SHARED if getattr(source, key) is None}
        found[client] = source.model_copy(update=shared)
    return found


def _config_path(client: str) -> str:
    return f"clients: '{client}': data"


def _common_schema(datasets: Mapping[str, Dataset]) -> Dataset:
    """Return what all sets are matched to: every class and every column that one of them has."""
    first, one = next(iter(datasets.items()))
    if named := [client for client, each in datasets.items() if each.train.patient is not None]:
        for client in datasets:
            if client not in named:
                raise UserError(
                    f"{_config_path(client)}.patient: missing, but '{named[0]}' names its patients"
                )
    for client, each in datasets.items():
        if each.task.kind != one.task.kind:
            raise UserError(
                f"{_config_path(client)}: {each.name} is {each.task.kind}, that of '{first}' {one.task.kind}; set data.task"
            )
        if each.train.time is not None:
            raise UserError(
                f"{_config_path(client)}: {each.name} is dated; name a common file in data.path"
            )
        if each.train.x.dtype != one.train.x.dtype:
            raise UserError(
                f"{_config_path(client)}: found {each.train.x.dtype} examples, '{first}' has {one.train.x.dtype}"
            )
    columns = tuple(dict.fromkeys(name for each in datasets.values() for name in each.columns))
    if not columns:
        for client, each in datasets.items():
            if each.train.x.shape[1:] != one.train.x.shape[1:]:
                found = tuple(each.train.x.shape[1:])
                expected = tuple(one.train.x.shape[1:])
                raise UserError(
                    f"{_config_path(client)}: examples have shape {found}, those of '{first}' {expected}"
                )
    task = one.task
    if task.kind == "multiclass":
        names = tuple(
            natural_order({name for each in datasets.values() for name in each.task.names})
        )
        outputs = len(names) if all(each.task.names for each in datasets.values()) else 0
        outputs = outputs or max(each.task.outputs for each in datasets.values())
        task = Task("multiclass", outputs, names if outputs == len(names) else ())
    categories = tuple(
        dict.fromkeys(pair for each in datasets.values() for pair in each.categories)
    )
    return Dataset(one.name, task, one.train, columns=columns, categories=categories)


def _concatenate(parts: Mapping[str, Examples]) -> Examples:
    """Return all rows, each of its client's group; patients are those of one file."""
    owners = [client for client, part in parts.items() for _ in range(len(part))]
    group, group_names = index_names(owners)
    x = torch.cat([part.x for part in parts.values()])
    y = torch.cat([part.labels for part in parts.values()])
    if all(part.patient is None for part in parts.values()):
        return Examples(x, y, group, group_names)
    whose: list[str] = []
    for client, part in parts.items():
        assert part.patient is not None  # all files name their patients, or none does
        whose += [f"{client}/{part.patient_names[number]}" for number in part.patient.tolist()]
    patient, patient_names = index_names(whose)
    return Examples(x, y, group, group_names, patient, patient_names)
