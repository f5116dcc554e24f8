"""A federation without a common file: the files of all clients are pooled, and each gets back what is left of its own.

This is the natural partition of one file with a column that says whose row it is. The common test set, the common validation
set and the proxy set are drawn from all rows by the rules of `federate`: keyed by the seed (the test set by the data set's name
alone), and whole patients where the files name them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from hetero_fl.config.clients import ClientSettings
from hetero_fl.config.population import Population
from hetero_fl.config.source import DataConfig, SourceConfig
from hetero_fl.data.base import Dataset, Examples, places
from hetero_fl.data.outside import adopt
from hetero_fl.data.registry import load_source, needs_path
from hetero_fl.data.views_of import needed
from hetero_fl.errors import UserError
from hetero_fl.state import in_order
from hetero_fl.task import Task

POOLED = ("table", "npz", "image_folder")
SHARED = ("label", "group", "patient", "task", "categories", "size")  # keys of `data` for files that leave them out


def has_common_source(config: DataConfig) -> bool:
    """Return whether the configuration names a common source: a data set by name, or a file."""
    return config.path is not None or not needs_path(config.name)


def pool(
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
        from hetero_fl.data.sources.tabular import common_categories  # loads pandas

        categories = common_categories({_where(client): source for client, source in sources.items()})
        sources = {c: s.model_copy(update={"categories": categories}) for c, s in sources.items()}
    own = {client: load_source(source, root, _where(client), missing) for client, source in sources.items()}
    like = _common(own)
    seen = needed((clients[client] for client in own), like.layout)
    parts = {client: adopt(each, like, _where(client), seen) for client, each in own.items()}
    train = _concatenated(parts)
    notes = [f"{_where(client)}: {note}" for client, each in own.items() for note in each.notes]
    notes.append(
        f"no data.path: common test, validation and proxy rows are drawn from the files of all {len(own)} clients"
    )
    about = f"{len(train):,} rows of {len(own)} files"
    gap = next((each.gap for each in own.values() if each.gap), "")
    dataset = replace(like, train=train, about=about, notes=tuple(notes), gap=gap)
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
            raise UserError(f"{missing}; without a common one, each client needs its own, but '{client}' has no data")
        if source.name != config.name:
            raise UserError(f"{_where(client)}.name: found {source.name}, but without data.path all are {config.name}")
        if source.path is not None and source.path in owner:
            raise UserError(
                f"{_where(client)}.path: found {source.path}, the file of '{owner[source.path]}'; without data.path each "
                "client has its own"
            )
        if source.categories not in (None, config.categories):
            raise UserError(f"{_where(client)}.categories: all files are encoded alike; set data.categories instead")
        owner[source.path] = client
        shared = {key: getattr(config, key) for key in SHARED if getattr(source, key) is None}
        found[client] = source.model_copy(update=shared)
    return found


def _where(client: str) -> str:
    return f"clients: '{client}': data"


def _common(own: Mapping[str, Dataset]) -> Dataset:
    """Return what all sets are matched to: every class and every column that one of them has."""
    first, one = next(iter(own.items()))
    if named := [client for client, each in own.items() if each.train.patient is not None]:
        for client in own:
            if client not in named:
                raise UserError(f"{_where(client)}.patient: missing, but '{named[0]}' names its patients")
    for client, each in own.items():
        if each.task.kind != one.task.kind:
            raise UserError(
                f"{_where(client)}: {each.name} is {each.task.kind}, that of '{first}' {one.task.kind}; set data.task"
            )
        if each.train.time is not None:
            raise UserError(f"{_where(client)}: {each.name} is dated; name a common file in data.path")
        if each.train.x.dtype != one.train.x.dtype:
            raise UserError(f"{_where(client)}: found {each.train.x.dtype} examples, '{first}' has {one.train.x.dtype}")
    columns = tuple(dict.fromkeys(name for each in own.values() for name in each.columns))
    if not columns:
        for client, each in own.items():
            if each.train.x.shape[1:] != one.train.x.shape[1:]:
                found, expected = tuple(each.train.x.shape[1:]), tuple(one.train.x.shape[1:])
                raise UserError(f"{_where(client)}: examples have shape {found}, those of '{first}' {expected}")
    task = one.task
    if task.kind == "multiclass":
        names = tuple(in_order({name for each in own.values() for name in each.task.names}))
        outputs = len(names) if all(each.task.names for each in own.values()) else 0
        outputs = outputs or max(each.task.outputs for each in own.values())
        task = Task("multiclass", outputs, names if outputs == len(names) else ())
    categories = tuple(dict.fromkeys(pair for each in own.values() for pair in each.categories))
    return Dataset(one.name, task, one.train, columns=columns, categories=categories)


def _concatenated(parts: Mapping[str, Examples]) -> Examples:
    """Return all rows, each of its client's group; patients are those of one file."""
    owners = [client for client, part in parts.items() for _ in range(len(part))]
    group, group_names = places(owners)
    x, y = torch.cat([part.x for part in parts.values()]), torch.cat([_y(part) for part in parts.values()])
    if all(part.patient is None for part in parts.values()):
        return Examples(x, y, group, group_names)
    whose: list[str] = []
    for client, part in parts.items():
        assert part.patient is not None  # all files name their patients, or none does
        whose += [f"{client}/{part.patient_names[number]}" for number in part.patient.tolist()]
    patient, patient_names = places(whose)
    return Examples(x, y, group, group_names, patient, patient_names)


def _y(part: Examples) -> torch.Tensor:
    assert part.y is not None  # load_source checked it
    return part.y
