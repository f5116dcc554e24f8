"""A federation without a common file: the files of all clients are pooled, and each gets its own back.

This is the natural partition of one file with a column that says whose row it is. The common test
set, the common validation set and the proxy set are drawn from all rows by the rules of `federate`:
keyed by the seed (the test set by the data set's name alone), and whole patients where the files
name them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from hetero_fl.config.clients import ClientSettings
from hetero_fl.config.data import DataConfig, SourceConfig
from hetero_fl.config.population import Population
from hetero_fl.core.task import Task
from hetero_fl.data.dataset import Dataset, Examples, concatenate_examples, index_names
from hetero_fl.data.external import match_to_common
from hetero_fl.data.preprocessing import raw_shape, required_columns
from hetero_fl.data.registry import load_source, needs_path
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.ordering import natural_order

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
        client: replace(
            load_source(source, root, _config_path(client), missing),
            name=Path(str(source.path)).name,
        )
        for client, source in sources.items()
    }
    like = _common_schema(own)
    seen = required_columns((clients[client] for client in own), like.layout)
    parts = {
        client: match_to_common(each, like, _config_path(client), seen, "another file")
        for client, each in own.items()
    }
    train = _concatenate(parts)
    notes = [
        f"{_config_path(client)}: {note}" for client, each in own.items() for note in each.notes
    ]
    notes += _note_unshared_classes(own)
    notes.append(
        f"no data.path: common test, validation and proxy rows are drawn from the files of all {len(own)} clients"
    )
    about = f"{len(train):,} rows of {len(own)} files"
    gap = next((each.min_gap for each in own.values() if each.min_gap), "")
    dataset = replace(
        like, name=config.name, train=train, about=about, notes=tuple(notes), min_gap=gap
    )
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
    columns = tuple(dict.fromkeys(name for each in datasets.values() for name in each.columns))
    with_patients = [client for client, each in datasets.items() if each.train.patient is not None]
    for client, each in datasets.items():
        where = _config_path(client)
        if with_patients and each.train.patient is None:
            raise UserError(
                f"{where}.patient: missing, but '{with_patients[0]}' names its patients"
            )
        if each.task.kind != one.task.kind:
            raise UserError(
                f"{where}: {each.name} is {each.task.kind}, that of '{first}' {one.task.kind}; "
                "set data.task"
            )
        if each.train.time is not None:
            raise UserError(f"{where}: {each.name} is dated; name a common file in data.path")
        if each.train.x.dtype != one.train.x.dtype:
            raise UserError(
                f"{where}: found {each.train.x.dtype} examples, '{first}' has {one.train.x.dtype}"
            )
        if not columns and raw_shape(each) != raw_shape(one):
            raise UserError(
                f"{where}: examples have shape {raw_shape(each)}, those of '{first}' "
                f"{raw_shape(one)}"
            )
    task = one.task
    if task.kind == "multiclass":
        _check_spelling(datasets)
        names = tuple(
            natural_order({name for each in datasets.values() for name in each.task.names})
        )
        if all(each.task.names for each in datasets.values()):
            task = Task("multiclass", len(names), names)
        else:
            outputs = max(each.task.outputs for each in datasets.values())
            task = Task("multiclass", outputs, names if outputs == len(names) else ())
    categories = tuple(
        dict.fromkeys(pair for each in datasets.values() for pair in each.categories)
    )
    return Dataset(one.name, task, one.train, columns=columns, categories=categories)


def _check_spelling(datasets: Mapping[str, Dataset]) -> None:
    """Raise UserError if the names of two classes differ in case or in spaces alone."""
    spellings: dict[str, tuple[str, Dataset]] = {}
    for client, each in datasets.items():
        for name in each.task.names:
            known, other = spellings.setdefault(" ".join(name.casefold().split()), (name, each))
            if known != name:
                raise UserError(
                    f"{_config_path(client)}: {each.name} has class '{name}', {other.name} has "
                    f"'{known}'; spell them alike"
                )


def _note_unshared_classes(datasets: Mapping[str, Dataset]) -> list[str]:
    """Return a line for each file none of whose classes is in another one."""
    num_files = Counter(name for each in datasets.values() for name in each.task.names)
    return [
        f"{_config_path(client)}: no other file has a class of {each.name}: {', '.join(names)}"
        for client, each in datasets.items()
        if len(datasets) > 1
        and each.task.kind == "multiclass"
        and (names := each.task.names)
        and all(num_files[name] == 1 for name in names)
    ]


def _concatenate(parts: Mapping[str, Examples]) -> Examples:
    """Return all rows, each of its client's group; patients are those of one file."""
    rows = concatenate_examples(list(parts.values()))
    owners = [client for client, part in parts.items() for _ in range(len(part))]
    rows.group, rows.group_names = index_names(owners)
    if rows.patient is not None:
        patients = [
            f"{client}/{part.patient_names[number]}"
            for client, part in parts.items()
            if part.patient is not None
            for number in part.patient.tolist()
        ]
        rows.patient, rows.patient_names = index_names(patients)
    return rows
