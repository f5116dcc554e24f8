"""Divide a data set among the participants of a federation."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from hetero_fl.config.clients import ClientSettings, PreprocessConfig
from hetero_fl.config.data import DataConfig
from hetero_fl.config.population import Population
from hetero_fl.core.task import Task
from hetero_fl.data.client_rows import ClientRows, LazyPartition
from hetero_fl.data.client_sources import clients_by_source, load_client_sources
from hetero_fl.data.dataset import Dataset, without_metadata
from hetero_fl.data.external import proxy_set
from hetero_fl.data.federated_data import CACHE_BYTES, FederatedData
from hetero_fl.data.labels import ALL_LABELS, note_similar_names, note_unshared_classes
from hetero_fl.data.overlap import (
    MAX_LISTED,
    POOL,
    PUBLIC_SETS,
    check_paths,
    notes_on_equal_rows,
    notes_on_shared_patients,
)
from hetero_fl.data.partition import assign_rows
from hetero_fl.data.partition.groups import check_patients_in_one_set
from hetero_fl.data.pixels import choose_range
from hetero_fl.data.preprocessing import (
    Preprocess,
    check_missing_values,
    check_settings,
    check_view,
    raw_shape,
)
from hetero_fl.data.registry import reads_key
from hetero_fl.data.splits import (
    RowSelection,
    Splits,
    check_times,
    common_sets,
    hold_out,
    split_clients,
    with_test,
)
from hetero_fl.utils.errors import UserError, suggest_or_list
from hetero_fl.utils.objects import OBJECT_PREFIX
from hetero_fl.utils.ordering import natural_key, natural_order
from hetero_fl.utils.seeding import keyed_generator
from hetero_fl.utils.text import Caution, format_list, pluralize, prefix_note

RARE = 0.1
"""Share of the training rows below which a class is rare."""


def federate(
    dataset: Dataset,
    config: DataConfig,
    clients: Mapping[str, ClientSettings],
    seed: int,
    *,
    cache_bytes: int = CACHE_BYTES,
    server: PreprocessConfig | None = None,
    absent: Collection[str] = (),
) -> FederatedData:
    """Partition a data set among clients.

    The steps are:

    1. Hold out a global test set if the data set has none, and limit the test rows to `test_limit`.
    2. Limit the training rows to `train_limit`.
    3. Hold out the proxy set, or load the proxy set from its own source. Remove the labels unless
       `proxy.labels` is set.
    4. Hold out the share `validation` as the global validation set if the data set has none.
    5. Partition the remaining rows among the clients without their own source. A source that
       several clients name is partitioned among these clients.
    6. Split the rows of each client into train, validation and test.

    The result does not depend on the order of `clients`. If the data identifies patients, no
    patient is in two of these sets, and the numbers of rows are approximate. With the partition
    `drawn`, clients sample their rows on first use.

    Data sets with times are split by date. In a natural partition, the validation and test rows of
    a client are then the rows of the client's groups in the global validation and test sets. For
    other data sets, they are the rows of the client's groups in `Dataset.local_sets`, if there are
    any.

    Args:
        dataset: Data set.
        config: Data configuration.
        clients: Client settings, keyed by client id.
        seed: Seed of the run.
        cache_bytes: Maximum size in bytes of each of the two caches of preprocessed examples.
        server: Preprocessing of the server. If None, the server has no model.
        absent: Clients whose rows are on other machines. These rows are not loaded.

    Returns:
        The data of all participants.

    Raises:
        UserError: If there are too few rows, if classes, columns or shapes do not match, if
            settings do not apply to the data, or if a participant without `missing: indicate` uses
            a missing value.

    Example:
        >>> from hetero_fl.config.clients import ClientSettings
        >>> from hetero_fl.config.data import DataConfig
        >>> from hetero_fl.data import federate, make_images
        >>> config = DataConfig(partition={"kind": "dirichlet", "alpha": 0.5}, proxy={"size": 100})
        >>> clients = {name: ClientSettings() for name in ("a", "b", "c")}
        >>> federate(make_images(), config, clients, seed=0).n_proxy
        100
    """
    _check_classes(dataset, config)
    _check_categories(dataset, config)
    is_object = config.name.startswith(OBJECT_PREFIX)
    check_patients_in_one_set(dataset, "data" if is_object else f"data: {dataset.name}")
    described = _mark_rare_class(with_test(dataset))
    # Partition functions see the metadata, which the participants do not need.
    dataset = without_metadata(described)
    check_times(dataset, config)
    population = Population.from_settings(clients)
    profiles = sorted(population.profiles, key=lambda profile: natural_key(profile.first))
    check_settings(profiles, dataset)

    rows = _limit_rows(dataset, config, seed)
    proxy, rows = proxy_set(dataset, config, rows, profiles, server=server, seed=seed)
    common, rows = common_sets(dataset, config, rows, seed)
    public = proxy | common

    sources = clients_by_source(config, population)
    check_paths(config, sources)
    notes = list(dataset.notes)
    lazy_partition: LazyPartition | None = None
    private: dict[str, Splits] = {}
    if config.partition.kind == "drawn":
        if absent:
            raise UserError(
                "data.partition.kind=drawn: clients on other machines have rows of their own; "
                "choose another kind"
            )
        pool = RowSelection(dataset.train, rows)
        lazy_partition = LazyPartition(
            pool, dataset.task, config.partition, config.split, population, seed
        )
        lazy_partition.check()
    else:
        owners = {name for names in sources.values() for name in names}
        private = _assign_and_split(
            dataset,
            described,
            rows,
            [name for name in population.ids if name not in owners and name not in absent],
            public["common_validation"],
            config=config,
            clients=population,
            seed=seed,
            notes=notes,
        )
    present = {
        source: local
        for source, names in sources.items()
        if (local := [name for name in names if name not in absent])
    }
    owned = load_client_sources(present, dataset, config, population, seed)
    client_rows = ClientRows(private | owned.private, lazy_partition)
    pixels = choose_range(dataset, config, client_rows, public)
    dataset = replace(dataset, pixel_range=pixels.value)
    compared: dict[str, Splits] = {
        name: dict(client_rows.assigned[name]) for name in natural_order(client_rows.assigned)
    }
    if lazy_partition is not None:
        compared[POOL] = {"train": lazy_partition.pool}
    is_natural = config.partition.kind == "natural"
    own = private | owned.private if is_natural else owned.private
    notes += notes_on_equal_rows(
        dataset, compared, public, owners=own, advice=_advice_on_equal_rows(dataset, config)
    )

    common_rows = {f"the {PUBLIC_SETS[name]}": part for name, part in public.items()}
    common_rows["the rows of other clients"] = RowSelection(dataset.train, rows)
    notes += notes_on_shared_patients(owned.private, common_rows)
    notes += _notes_on_few_rows(dataset, compared, public)
    if dataset.task.kind == "multiclass" and not dataset.predicts_items:
        # A partition may separate classes on purpose.
        notes += _notes_on_classes(dataset.task, compared, public, own, is_complete=not absent)
    notes += [*pixels.notes, *owned.notes]
    notes += check_missing_values(
        profiles,
        population,
        client_rows,
        public,
        layout=dataset.layout,
    )
    if server is not None:
        _check_server(server, dataset, public)
    return FederatedData(
        dataset.task,
        dataset.name,
        population,
        client_rows,
        public,
        seed=seed,
        simulated=dataset.simulated or owned.simulated,
        about=dataset.about,
        cache_bytes=cache_bytes,
        notes=notes,
        layout=dataset.layout,
        vocabulary=dataset.vocabulary,
    )


def _advice_on_equal_rows(dataset: Dataset, config: DataConfig) -> str:
    """Return what to do about equal rows, which may belong to a patient."""
    advice = "remove them from one of the sets"
    if dataset.train.patient is None and config.name.startswith(OBJECT_PREFIX):
        return f"{advice}, or pass patient=... to keep the rows of a patient together"
    if dataset.train.patient is None and reads_key(config.name, "patient"):
        return f"{advice}, or set data.patient to keep the rows of a patient together"
    return advice


def _notes_on_few_rows(
    dataset: Dataset, clients: Mapping[str, Splits], public: Mapping[str, RowSelection]
) -> list[str]:
    """Return warnings about sets with fewer rows than classes, with which no score is meaningful.

    Sets from which the next word or item is predicted may have fewer rows than classes.
    """
    task = dataset.task
    if dataset.predicts_items:
        return []
    least = task.outputs if task.kind == "multiclass" else 2
    reason = f"fewer than the {least} classes" if task.kind == "multiclass" else "too few"
    few = [
        f"the {PUBLIC_SETS[name]} has {pluralize(len(part.rows), 'row')}"
        for name, part in public.items()
        if name != "common_validation" and len(part.rows) < least
    ]
    few += [
        f"client '{client}' has {pluralize(len(own['train'].rows), 'training row')}"
        for client, own in clients.items()
        if client != POOL and len(own["train"].rows) < least
    ]
    if not few:
        return []
    return [Caution(f"{format_list(few, MAX_LISTED)}, {reason}, so that results mean little")]


def _notes_on_classes(
    task: Task,
    clients: Mapping[str, Splits],
    public: Mapping[str, RowSelection],
    checked: Collection[str],
    *,
    is_complete: bool,
) -> list[str]:
    """Return warnings about classes that may be one class in several spellings.

    Args:
        task: Learning task.
        clients: Rows of the clients, keyed by client id, and those that clients sample.
        public: Public sets, keyed by name.
        checked: Clients that should share a class with another client.
        is_complete: Whether the rows of all clients are on this machine.
    """
    notes = note_similar_names(task.names, ALL_LABELS)
    evaluated = [part for name, part in public.items() if name != "proxy"]
    evaluated += [part for own in clients.values() for name, part in own.items() if name != "train"]
    known = _classes([own["train"] for own in clients.values()], task)
    unseen = [name for name in _classes(evaluated, task) if name not in known]
    if unseen and is_complete:
        notes.append(
            Caution(
                f"{ALL_LABELS}: validation or test rows have classes that no training rows have: "
                f"{format_list(unseen, MAX_LISTED, quote=True)}; use one coding of the classes"
            )
        )
    of_client = {
        name: _classes(own.values(), task) for name, own in clients.items() if name != POOL
    }
    return notes + note_unshared_classes(of_client, checked)


def _classes(parts: Iterable[RowSelection], task: Task) -> list[str]:
    """Return the names of the classes of the rows."""
    # The rows of all clients may be on other machines.
    labels = [torch.zeros(0, dtype=torch.int64)]
    labels += [part.examples.labels[part.rows] for part in parts]
    return [task.output_names[i] for i in torch.cat(labels).unique().tolist()]


def _mark_rare_class(dataset: Dataset) -> Dataset:
    """Return a copy of a binary data set with `task.rare` set to the rare class.

    A class is rare if it has at least one row, but less than a tenth of the training rows. The data
    set itself is returned if no class is rare, the task is not multiclass with two classes, the
    training rows have no labels, or `task.rare` is already set.
    """
    task = dataset.task
    y = dataset.train.y
    if y is None or task.kind != "multiclass" or task.outputs != 2 or task.rare is not None:
        return dataset
    counts = torch.bincount(y, minlength=2)
    rare = int(counts.argmin())
    scarce = 0 < counts[rare] < RARE * len(y)
    return replace(dataset, task=replace(task, rare=rare)) if scarce else dataset


def _check_classes(dataset: Dataset, config: DataConfig) -> None:
    """Check that the training rows of a multiclass data set have at least two classes.

    Raises:
        UserError: If there is a single class.
    """
    task = dataset.task
    found = torch.arange(task.outputs) if dataset.train.y is None else dataset.train.y.unique()
    if task.kind == "multiclass" and (task.outputs < 2 or len(found) == 1):
        where = f"data.path: {config.path}" if config.path else f"data.name: {dataset.name}"
        column = f"column '{config.label}'" if config.label else "labels"
        empty = format_list(dataset.empty_classes, quote=True)
        raise UserError(
            f"{where}: {column}: needs two classes, got '{task.output_names[found[0]]}' in all "
            f"{len(dataset.train):,} rows" + (f"; found no images of {empty}" if empty else "")
        )


def _check_categories(dataset: Dataset, config: DataConfig) -> None:
    """Check that the columns of `data.categories` are one-hot encoded features of the data set.

    Raises:
        UserError: If a column is not such a feature.
    """
    encoded = dict(dataset.categories)
    for column in config.categories or {}:
        if column not in encoded:
            raise UserError(
                f"data.categories: column '{column}' not found among the features of "
                f"{dataset.name}{suggest_or_list(column, dataset.columns)}"
            )


def _limit_rows(dataset: Dataset, config: DataConfig, seed: int) -> Tensor:
    """Return the indices of at most `data.train_limit` training rows, int64 `[M]`."""
    rows = torch.arange(len(dataset.train))
    patient = dataset.train.patient
    if config.train_limit is None:
        return rows
    if not len(rows):
        raise UserError(
            "data.train_limit: has no effect, because no training rows are divided; remove it"
        )
    if config.train_limit >= len(rows):
        return rows
    generator = keyed_generator("data", seed, "train_limit")
    return hold_out(rows, config.train_limit, generator, patient=patient, leave=0)[0]


def _assign_and_split(
    dataset: Dataset,
    described: Dataset,
    rows: Tensor,
    names: list[str],
    validation: RowSelection,
    *,
    config: DataConfig,
    clients: Population,
    seed: int,
    notes: list[str],
) -> dict[str, Splits]:
    """Assign rows to clients, and split the rows of each client.

    Args:
        dataset: Data set without metadata, with a test set.
        described: The same data set with metadata.
        rows: Training rows to divide, int64 `[M]`.
        names: Ids of the clients.
        validation: Global validation set.
        config: Data configuration.
        clients: Client settings, keyed by client id.
        seed: Seed of the run.
        notes: List to which remarks are appended.

    Raises:
        UserError: If there are too few rows.
    """
    if not names:
        return {}
    assigned = assign_rows(
        described, rows, names, config=config, clients=clients, seed=seed, notes=notes
    )
    assert dataset.test is not None
    shares = {name: RowSelection(dataset.train, own.rows) for name, own in assigned.items()}
    given: dict[str, RowSelection] = {}
    if config.partition.kind == "natural" and dataset.train.time is not None:
        # `test_limit` applies to the global test set only, not to the clients.
        given = {"validation": validation, "test": RowSelection.all_rows(dataset.test)}
    elif config.partition.kind == "natural":
        given = {name: RowSelection.all_rows(part) for name, part in dataset.local_sets.items()}
    found: list[str] = []
    splits = split_clients(shares, given, config.split, seed, span=dataset.span, notes=found)
    notes += [prefix_note(dataset.name, note) for note in found]
    return splits


def _check_server(
    server: PreprocessConfig, dataset: Dataset, public: Mapping[str, RowSelection]
) -> None:
    """Raise UserError if the server cannot use a public set because of a missing value."""
    view = Preprocess.without_normalization(
        server, dataset.layout, raw_shape(dataset), "server.preprocess"
    )
    check_view(public, view, dataset.layout, "server.preprocess")
