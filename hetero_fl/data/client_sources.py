"""Separate sources of clients, next to a main data set or pooled into one.

In a pooled data set, each client is a group. `federate` holds out the global test, validation and
proxy sets from the pooled rows and returns the remaining rows to their clients by the natural
partition.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from hetero_fl.config.clients import ClientSettings
from hetero_fl.config.data import DataConfig, SourceConfig
from hetero_fl.config.population import Population
from hetero_fl.core.images import MAX_BYTE, PIXEL_TYPES, dtype_name, exceeds
from hetero_fl.data.dataset import Dataset, Examples, concatenate_examples
from hetero_fl.data.external import (
    ROLE_KEYS,
    inherit_keys,
    match_to_common,
    source_with_task,
)
from hetero_fl.data.labels import ALL_LABELS, common_classes
from hetero_fl.data.overlap import resolve_path
from hetero_fl.data.partition import assign_rows
from hetero_fl.data.partition.groups import check_patients_in_one_set
from hetero_fl.data.preprocessing import check_same_shape, raw_shape, required_columns
from hetero_fl.data.registry import Key, check_unread_keys, load_source, needs_path
from hetero_fl.data.splits import RowSelection, Splits, split_clients, without_given
from hetero_fl.utils.arrays import index_names
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.objects import OBJECT_PREFIX
from hetero_fl.utils.seeding import stream_key
from hetero_fl.utils.text import pluralize, prefix_note

POOLED = ("table", "npz", "image_folder")
"""Sources whose files can be pooled."""
OWN_DATA = "own data"
"""Name of the data in reports if the clients' data are objects instead of files."""


def has_common_source(config: DataConfig) -> bool:
    """Return whether the section `data` configures a source for all clients.

    Such a source has a path or, like a data set of the package, needs no path.
    """
    if config.name == OBJECT_PREFIX:
        # This is a federation from objects without a global test set.
        return False
    return config.path is not None or not needs_path(config.name)


def pool_client_files(
    config: DataConfig, clients: Population, missing: bool
) -> tuple[Dataset, DataConfig, Mapping[str, ClientSettings]]:
    """Load the files of all clients as one data set whose groups are the clients.

    Args:
        config: Data configuration without a source for all clients.
        clients: Client settings, keyed by client id. Each client must have its own source.
        missing: Whether values may be missing (NaN).

    Returns:
        The arguments of `federate`: the data set, the data configuration with the natural
        partition, and the client settings without sources.

    Raises:
        UserError: If a client has no file, two clients have the same file, or files do not match.
    """
    if config.name == OBJECT_PREFIX:
        check_unread_keys(config, "data")
    sources = _sources(config, clients)
    root = Path(config.root).expanduser()
    if config.name == "table" and config.categories is None:
        # Imported here because loading pandas is slow.
        from hetero_fl.data.sources.tables.frames import common_categories

        categories = common_categories(
            {_config_path(client): source for client, source in sources.items()}
        )
        sources = {c: s.model_copy(update={"categories": categories}) for c, s in sources.items()}
    own = {
        client: replace(
            load_source(source, root, _config_path(client), missing),
            name=f"'{client}'" if source.path is None else Path(source.path).name,
        )
        for client, source in sources.items()
    }
    schema = _common_schema(own)
    needed = required_columns((clients[client] for client in own), schema.layout)
    parts = {
        client: match_to_common(each, schema, _config_path(client), needed, "another client")
        for client, each in own.items()
    }
    train = _concatenate(parts)
    notes = [
        _located(note, _config_path(client)) for client, each in own.items() for note in each.notes
    ]
    for client, each in own.items():
        _check_size(client, len(each.train), config, sources[client])
    is_from_objects = config.name == OBJECT_PREFIX
    notes.append(
        f"{'no test set' if is_from_objects else 'data.path is not set'}: global test, validation "
        f"and proxy rows are held out of the {'data' if is_from_objects else 'files'} of all "
        f"{len(own)} clients"
    )
    dataset = replace(
        schema,
        name=OWN_DATA if is_from_objects else config.name,
        # Objects get the same test rows as files of the same content.
        source=("table" if schema.columns else "npz") if is_from_objects else config.name,
        train=train,
        about=f"{len(train):,} rows of {len(own)} {'clients' if is_from_objects else 'files'}",
        notes=tuple(notes),
    )
    # The sizes are checked above, before rows are held out.
    partition = config.partition.model_copy(update={"kind": "natural", "min_size": 1})
    settings = {client: each.model_copy(update={"data": None}) for client, each in clients.items()}
    return dataset, config.model_copy(update={"partition": partition}), settings


def _sources(config: DataConfig, clients: Population) -> dict[str, SourceConfig]:
    """Return the source of each client, with unset keys filled in from `data`."""
    missing = "data.path: missing"
    if config.name not in (*POOLED, OBJECT_PREFIX):
        raise UserError(
            f"{missing}; only data.name {', '.join(POOLED)} can pool the files of clients, got "
            f"{config.name}"
        )
    if config.partition.kind not in ("iid", "natural"):
        raise UserError(
            f"data.partition.kind={config.partition.kind} needs data.path, as otherwise every "
            "client has its own file; remove it"
        )
    found: dict[str, SourceConfig] = {}
    owner: dict[Path | None, str] = {}
    for client in clients.ids:
        source = clients[client].data
        if source is None:
            raise UserError(
                f"{missing}, and client '{client}' has no data of its own; set data.path, or "
                "data for each client"
            )
        if not source.name.startswith(OBJECT_PREFIX) and source.name != config.name:
            if config.name == OBJECT_PREFIX:
                raise UserError(
                    f"{_config_path(client)}: got a source, which cannot be pooled with data in "
                    "memory to hold out a global test set; pass test=..."
                )
            raise UserError(
                f"{_config_path(client)}.name: must be {config.name} as in data.name if data.path "
                f"is not set, got {source.name}"
            )
        path = resolve_path(source)
        if path is not None and path in owner:
            raise UserError(
                f"{_config_path(client)}.path: already used by client '{owner[path]}', got "
                f"'{source.path}'; set a different file for each client"
            )
        if source.categories not in (None, config.categories):
            raise UserError(
                f"{_config_path(client)}.categories: must be the same for all clients; set "
                "data.categories instead"
            )
        owner[path] = client
        is_object = source.name.startswith(OBJECT_PREFIX)
        found[client] = source if is_object else inherit_keys(source, config, ROLE_KEYS)
    return found


def _config_path(client: str) -> str:
    return f"clients: '{client}': data"


def _common_schema(datasets: Mapping[str, Dataset]) -> Dataset:
    """Return a data set with the first rows and the classes and columns of all."""
    first_client, first = next(iter(datasets.items()))
    columns = tuple(dict.fromkeys(name for each in datasets.values() for name in each.columns))
    with_patients = [client for client, each in datasets.items() if each.train.patient is not None]
    for client, each in datasets.items():
        where = _config_path(client)
        if with_patients and each.train.patient is None:
            raise UserError(
                f"{where}: no patients, but client '{with_patients[0]}' has patients; set patient "
                "for all clients or for none"
            )
        if each.task.kind != first.task.kind:
            raise UserError(
                f"{where}: expected a {first.task.kind} task as for client '{first_client}', got "
                f"{each.task.kind} in {each.name}; set data.task"
            )
        if each.train.time is not None:
            raise UserError(
                f"{where}: time series such as {each.name} cannot be pooled; set data.path to a "
                "common file"
            )
        types = {each.train.x.dtype, first.train.x.dtype}
        if len(types) > 1 and (
            types != set(PIXEL_TYPES)
            or any(exceeds(part.train.x, MAX_BYTE) for part in (first, each))
        ):
            raise UserError(
                f"{where}: expected {dtype_name(first.train.x)} examples as for client "
                f"'{first_client}', got {dtype_name(each.train.x)}"
            )
        if not columns and raw_shape(each) != raw_shape(first):
            raise UserError(
                f"{where}: expected examples of shape {raw_shape(first)} as for client "
                f"'{first_client}', got {raw_shape(each)}"
            )
    task = first.task
    if task.kind == "multiclass":
        tasks = {
            f"{_config_path(client)}: {each.name}": each.task for client, each in datasets.items()
        }
        task = common_classes(tasks)
    categories = tuple(
        dict.fromkeys(pair for each in datasets.values() for pair in each.categories)
    )
    return Dataset(
        first.name,
        task,
        first.train,
        columns=columns,
        categories=categories,
        vocabulary=first.vocabulary,
        blocks=first.blocks,
        pixel_range=first.pixel_range if first.blocks else None,
    )


def _concatenate(parts: Mapping[str, Examples]) -> Examples:
    """Concatenate the rows of all clients as groups, with client ids prefixed to patient names."""
    rows = concatenate_examples(list(parts.values()))
    owners = [client for client, part in parts.items() for _ in range(len(part))]
    rows.group, rows.group_names = index_names(owners)
    if rows.row is not None:
        rows.files = tuple(parts[client].files[0] for client in rows.group_names)
    if rows.patient is not None:
        patients = [
            f"{client}/{part.patient_names[number]}"
            for client, part in parts.items()
            if part.patient is not None
            for number in part.patient.tolist()
        ]
        rows.patient, rows.patient_names = index_names(patients)
    return rows


@dataclass
class ClientSources:
    """The rows of clients with their own sources.

    Attributes:
        private: Splits of each client, keyed by client id.
        notes: Remarks on how the sources were read.
        simulated: Whether any of the sources is simulated.
    """

    private: dict[str, Splits]
    notes: list[str]
    simulated: bool


def clients_by_source(config: DataConfig, clients: Population) -> dict[SourceConfig, list[str]]:
    """Return the ids of the clients with their own sources, keyed by source.

    Clients without their own source are not included.

    Raises:
        UserError: If the source of a client is the source of the main data set.
    """
    clients_of: dict[SourceConfig, list[str]] = {}
    # The first spelling of a path stands for the others.
    first: dict[SourceConfig, SourceConfig] = {}
    main = (config.name, resolve_path(config), config.arguments)
    named = any(profile.settings.data is not None for profile in clients.profiles)
    for name in clients.ids if named else ():
        source = clients[name].data
        if source is not None:
            path = resolve_path(source)
            if (source.name, path, source.arguments) == main:
                raise UserError(
                    f"clients: '{name}': data: is the source of the main data set; remove it to "
                    "use a part of the main data set"
                )
            resolved = source.model_copy(update={"path": path and str(path)})
            clients_of.setdefault(first.setdefault(resolved, source), []).append(name)
    return clients_of


def load_client_sources(
    clients_of: Mapping[SourceConfig, list[str]],
    common_set: Dataset,
    config: DataConfig,
    clients: Population,
    seed: int,
) -> ClientSources:
    """Load the separate sources of clients, and partition and split the rows of each source.

    Args:
        clients_of: Ids of the clients with their own sources, keyed by source.
        common_set: Main data set, to whose classes and columns the rows are converted.
        config: Data configuration.
        clients: Client settings, keyed by client id.
        seed: Seed of the run.

    Returns:
        The rows of the clients, and remarks on how the sources were read.

    Raises:
        UserError: If a source does not match the main data set, or several clients share a source
            in the partition `drawn`.
    """
    found = ClientSources({}, [], False)
    for source, owners in clients_of.items():
        where = f"clients: '{owners[0]}': data"
        roles: tuple[Key, ...] = ("label",) if source.path is not None else ()
        read = source_with_task(
            source, common_set.task, common_set.categories, main=config, roles=roles
        )
        own = load_source(read, Path(config.root).expanduser(), where, missing=True)
        check_patients_in_one_set(own, where)
        found.simulated |= own.simulated
        found.notes += [_located(note, where) for note in own.notes]
        needed = required_columns((clients[name] for name in owners), common_set.layout)
        converted = Dataset(
            own.name,
            common_set.task,
            match_to_common(own, common_set, where, needed),
            columns=common_set.columns,
            span=own.span,
        )
        for name in owners:
            check_same_shape(
                raw_shape(converted),
                f"clients: '{name}': data",
                clients={name: clients[name]},
                common=common_set,
            )
        shares = _divide_rows(
            converted, source, owners, config=config, clients=clients, seed=seed, notes=found.notes
        )
        given = _given_sets(own, source) if len(owners) == 1 else {}
        for name in owners:
            rows = len(shares[name].rows) + sum(map(len, given.values()))
            _check_size(name, rows, config, source)
        # Rows are held out only for the sets that are not given.
        held_out = without_given(config.split, given)
        splits = split_clients(shares, {}, held_out, seed, span=own.span, notes=found.notes)
        for name, part in given.items():
            matched = match_to_common(replace(own, train=part), common_set, where, needed)
            splits[owners[0]][name] = RowSelection.all_rows(matched)
        found.private |= splits
    return found


def _check_size(client: str, rows: int, config: DataConfig, source: SourceConfig) -> None:
    """Raise UserError if the source of a client has fewer than `data.partition.min_size` rows."""
    if rows < config.partition.min_size:
        cure = f"data.partition.min_size={rows}"
        is_object = source.name.startswith(OBJECT_PREFIX)
        raise UserError(
            f"clients: '{client}': data: has {pluralize(rows, 'row')}, fewer than "
            f"data.partition.min_size={config.partition.min_size}; give the client more rows, or "
            + (f'pass overrides=["{cure}"]' if is_object else f"set {cure}")
        )


def _located(note: str, where: str) -> str:
    """Return a note that names its source, unless it is about the labels of all sources."""
    is_located = note.startswith((where, f"{ALL_LABELS}:"))
    return note if is_located else prefix_note(where, note)


def _divide_rows(
    dataset: Dataset,
    source: SourceConfig,
    owners: list[str],
    *,
    config: DataConfig,
    clients: Population,
    seed: int,
    notes: list[str],
) -> dict[str, RowSelection]:
    """Partition the rows of a source among the clients that name it.

    A single client gets all rows, including all groups. Partition functions see the metadata, which
    the clients do not need.

    Args:
        dataset: Rows of the source, converted to the columns of the main data set.
        source: Configuration of the source.
        owners: Ids of the clients.
        config: Data configuration.
        clients: Client settings, keyed by client id.
        seed: Seed of the run.
        notes: List to which remarks are appended.
    """
    train = replace(dataset.train, metadata={})
    all_rows = RowSelection.all_rows(train)
    if len(owners) == 1:
        return {owners[0]: all_rows}
    if config.partition.kind == "drawn":
        raise UserError(
            f"data.partition.kind=drawn cannot divide {source.name}, the source of "
            f"{len(owners)} clients; set it for one client, or choose another kind"
        )
    # A seed for each source: with the seed of the run, two sources would be divided in the same
    # proportions.
    own_seed = stream_key("data", seed, "own source", source.name, source.path or "")
    assigned = assign_rows(
        dataset, all_rows.rows, owners, config=config, clients=clients, seed=own_seed, notes=notes
    )
    return {name: RowSelection(train, part.rows) for name, part in assigned.items()}


def _given_sets(own: Dataset, source: SourceConfig) -> dict[str, Examples]:
    """Return the validation and test sets of a client's source that are not held out of its rows.

    A program passes these sets on purpose. Of files, only the sets of groups and, in time series,
    both later periods are used.
    """
    given = {name: part for name, part in own.splits().items() if name != "train"}
    has_periods = own.train.time is not None and len(given) == 2
    return given if source.name.startswith(OBJECT_PREFIX) or has_periods else dict(own.local_sets)
