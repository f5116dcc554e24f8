"""Data from other sources than the main data set, such as proxy sets.

The main data set is the one that the section `data` configures. Data from other sources is
converted to the classes, columns and blocks of the main data set.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hetero_fl.config.clients import PreprocessConfig
from hetero_fl.config.data import SHARED_KEYS, DataConfig, SharedSettings, SourceConfig
from hetero_fl.config.population import SettingsProfile
from hetero_fl.core.images import MAX_BYTE, to_floats
from hetero_fl.core.task import Task
from hetero_fl.data.dataset import (
    Categories,
    ColumnLayout,
    Dataset,
    Examples,
    Vocabulary,
)
from hetero_fl.data.labels import renumber_targets
from hetero_fl.data.preprocessing import check_same_shape, required_columns
from hetero_fl.data.registry import (
    Key,
    check_links,
    check_roles,
    has_documented_classes,
    load_source,
    reads_key,
    value_for_file,
)
from hetero_fl.data.sources.image_files import image_files, read_image_files
from hetero_fl.data.splits import RowSelection, hold_out
from hetero_fl.data.table import Table, build
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.objects import OBJECT_PREFIX
from hetero_fl.utils.seeding import keyed_generator

ROLE_KEYS: tuple[Key, ...] = ("label", "group", "patient")
"""Keys that name columns or arrays."""
VALUE_KEYS: tuple[Key, ...] = ("read", "windows", "series", *SHARED_KEYS)
"""Keys that determine how values of files become examples."""
SAME_SOURCE_KEYS: tuple[Key, ...] = ("task", "categories", "size")
"""Keys that determine how values become examples in files of one source only."""
PROXY_COLUMNS = "data.proxy.columns"
MISSING_ADVICE = (
    "; if a client lacks it, set clients.defaults.preprocess.missing=indicate, or list the columns "
    "of the client in its preprocess.columns"
)
VOCABULARY_ADVICE = (
    "set the same text (length, tokenizer, vocabulary, public), or path of movies, for both"
)


def match_to_common(
    own: Dataset,
    common_set: Dataset,
    where: str,
    needed: Collection[str] | None = None,
    owner: str = "the main data set",
) -> Examples:
    """Convert the training rows of a source to the classes and features of the main data set.

    Named classes and features are matched by name, unnamed ones by number. The source may lack
    classes, and features that are not needed.

    Args:
        own: Data set of the client.
        common_set: Main data set.
        where: Configuration key of the source, for error messages.
        needed: Tensors or blocks that the source must have. If None, all are required.
        owner: Owner of the needed columns, for error messages.

    Returns:
        The training rows of the source, with the classes and features of the main data set.

    Raises:
        UserError: If the tasks differ, the source has an unknown class, column or block, or a
            needed column or block is missing.
    """
    y = match_labels(own, common_set, where)
    if not set(own.categories) <= set(common_set.categories):
        raise UserError(
            f"{where}.categories: {own.name} encodes other values than the main data set; "
            "set data.categories only"
        )
    place = _place(where, own.name)
    return replace(
        own.train, x=match_inputs(own, common_set, place, needed=needed, owner=owner), y=y
    )


def match_inputs(
    own: Dataset,
    common_set: Dataset,
    where: str,
    *,
    needed: Collection[str] | None,
    owner: str = "the main data set",
    may_have_more: bool = False,
) -> Tensor:
    """Return the training inputs of a source with the features of the main data set.

    Examples that have the shape of a single block become this block (see also
    `ColumnLayout.match`).
    """
    x = own.train.x
    layout = own.layout
    expected, found = (each.pixel_range or MAX_BYTE for each in (common_set, own))
    if own.blocks and common_set.blocks and expected != found:
        raise UserError(
            f"{where}: expected pixels that were divided by {expected:g} as in other data, got "
            f"{found:g}; pass pixel_range={max(expected, found):g} to join_images_and_table for "
            "all data sets"
        )
    if common_set.blocks and not own.blocks and x.shape[1:] != common_set.train.x.shape[1:]:
        shape = tuple(x.shape[1:])
        candidates = [block for block in common_set.blocks if block.shape == shape]
        if len(candidates) != 1:
            known = ", ".join(f"{b.name} {b.shape}" for b in common_set.blocks)
            raise UserError(
                f"{where}: examples of shape {shape} match no single block of {common_set.name}; "
                f"choose from {known}"
            )
        x = to_floats(x, common_set.pixel_range).flatten(1)
        layout = ColumnLayout(blocks=tuple(candidates))
    return common_set.layout.match(
        x,
        layout,
        where,
        needed=needed,
        owner=owner,
        advice=MISSING_ADVICE,
        may_have_more=may_have_more,
    )


def _place(where: str, name: str) -> str:
    """Return a place for error messages: the key of a source and its name, if they differ."""
    return where if name == where else f"{where}: {name}"


def match_labels(own: Dataset, common_set: Dataset, where: str) -> Tensor:
    """Return the training targets of a data set with the class numbers of the main data set.

    Args:
        own: Data set.
        common_set: Main data set.
        where: Configuration key of `own`, for error messages.

    Raises:
        UserError: If the vocabularies or tasks differ, or a class does not exist in the main data
            set.
    """
    place = _place(where, own.name)
    if own.vocabulary != common_set.vocabulary:
        raise UserError(
            f"{place}: the vocabulary differs from that of the main data set; {VOCABULARY_ADVICE}"
        )
    numbered = has_documented_classes(common_set.source, common_set.task)
    return renumber_targets(
        own.train.labels,
        own.task,
        common_set.task,
        place,
        owner="the main data set",
        numbered=numbered,
    )


def inherit_keys(
    source: SourceConfig, main: SourceConfig, roles: Collection[Key] = ()
) -> SourceConfig:
    """Fill in the unset keys with which a source reads files from those of the main data set.

    These are the keys of values, such as `read`, `series` and `text`, and for sources of the same
    name also `task`, `categories` and `size`. Settings that select rows of the main data set, or
    that do not apply to the file of the source, are not filled in.

    Args:
        source: Source configuration.
        main: Configuration of the main data set.
        roles: Keys that name columns or arrays, such as `label`, to fill in, too.

    Returns:
        A copy of the source configuration.
    """
    is_same = source.name == main.name
    found: dict[str, Any] = {}
    for key in (*roles, *VALUE_KEYS, *(SAME_SOURCE_KEYS if is_same else ())):
        value = getattr(main, key)
        if getattr(source, key) is None and (
            reads_key(source.name, key) or (is_same and source.path is not None)
        ):
            if isinstance(value, SharedSettings):
                names = () if source.path is not None else value.of_files
                value = value.without([*value.selection, *names])
            found[key] = value_for_file(source, key, value)
    return source.model_copy(update=found)


def source_with_task(
    source: SourceConfig,
    task: Task,
    categories: Categories = (),
    *,
    main: SourceConfig,
    roles: Collection[Key] = (),
) -> SourceConfig:
    """Fill in the unset keys of a source from the main data set (see `inherit_keys`).

    Sources also get the kind of the task, which a single file may not determine, and tables the
    categories.

    Args:
        source: Source configuration.
        task: Task of the main data set.
        categories: Categories of the main data set.
        main: Configuration of the main data set.
        roles: Keys that name columns or arrays, such as `label`, to fill in.

    Returns:
        A copy of the source configuration.
    """
    found: dict[str, Any] = {}
    if source.name == "table" and source.categories is None:
        found["categories"] = dict(categories)
    if reads_key(source.name, "task") and source.task is None:
        found["task"] = task.kind
    return inherit_keys(source.model_copy(update=found), main, roles)


def load_unlabeled(
    config: SourceConfig, root: Path, where: str, vocabulary: Vocabulary | None = None
) -> Dataset:
    """Load a data set whose labels are not used, and which may have none.

    Values may be missing (NaN). Local files need no labels. A `.npz` file may contain
    `train_images` only, a table may have no label column, and a folder of images may have no class
    folders.

    Args:
        config: Source configuration.
        root: Folder for downloads.
        where: Configuration section, for error messages.
        vocabulary: Vocabulary that the source must have. If None, the examples are not tokens.

    Returns:
        The data set, whose task has no meaning.

    Raises:
        UserError: If the source cannot be loaded (see `load_source`) or has another vocabulary.
    """
    found = _load_flat_folder(config, root, where)
    if found is None:
        found = load_source(config, root, where, missing=True, labeled=False)
    if found.vocabulary != vocabulary:
        raise UserError(
            f"{where}: {config.name}: the vocabulary differs from that of the main data set; "
            f"{VOCABULARY_ADVICE}"
        )
    return found


def _load_labeled(
    config: SourceConfig, root: Path, where: str, common_set: Dataset
) -> tuple[Dataset, Tensor]:
    """Load a data set, and convert the labels to the class numbers of the main data set."""
    try:
        own = load_source(config, root, where, missing=True)
        if own.train.y is None:
            raise UserError(f"{where}: has no labels; pass a pair (x, y) or a data frame")
        return own, match_labels(own, common_set, where)
    except UserError as error:
        raise UserError(f"data.proxy.labels=true needs matching labels: {error}") from error


def _load_flat_folder(config: SourceConfig, root: Path, where: str) -> Dataset | None:
    """Return the images of a folder without folders of classes, or None for other sources."""
    if config.path is None or config.name != "image_folder":
        return None
    path = Path(config.path).expanduser()
    try:
        check_links(config, where)
        files = image_files(path)
        if not files or any(file.parent != path for file in files):
            return None
        x = read_image_files(files, config.size, root if config.stream else None)
    except UserError as error:
        raise UserError(f"{where}.{error}") from error
    place = f"{where}.path: {config.path}"
    return build([Table(x, where=place)], None, config.name)


def proxy_set(
    dataset: Dataset,
    config: DataConfig,
    rows: Tensor,
    profiles: Sequence[SettingsProfile],
    *,
    server: PreprocessConfig | None,
    seed: int,
) -> tuple[dict[str, RowSelection], Tensor]:
    """Hold out the proxy set from the training rows, or load the proxy set from its own source.

    The selection of rows does not depend on labels. Labels are removed unless `data.proxy.labels`
    is set.

    Args:
        dataset: Main data set.
        config: Data configuration.
        rows: Training rows to hold out from, int64 `[M]`.
        profiles: Distinct settings of the clients that use the proxy set.
        server: Preprocessing of the server. If None, the server has no model.
        seed: Seed of the run.

    Returns:
        The proxy set as `{"proxy": rows}`, or an empty dictionary if no proxy set is configured,
        and the remaining training rows.

    Raises:
        UserError: If there are too few rows, or the source does not match the main data set.
    """
    generator = keyed_generator("data", seed, "proxy")
    if config.proxy.source is not None:
        proxy = _load_proxy_set(dataset, config, profiles, server, generator)
    elif config.proxy.size > 0:
        proxy, rows = _hold_out(dataset, config, rows, generator)
    else:
        return {}, rows
    return {"proxy": proxy}, rows


def _hold_out(
    dataset: Dataset, config: DataConfig, rows: Tensor, generator: torch.Generator
) -> tuple[RowSelection, Tensor]:
    """Sample the proxy set from the training rows that have values in all public columns."""
    size = config.proxy.size
    names = config.proxy.columns
    train = dataset.train
    complete = rows
    detail = ""
    if names is not None:
        x = train.x
        complete = rows[dataset.layout.has_values(x[rows], names, PROXY_COLUMNS)]
        detail = f" with {' and '.join(names)}"
    if not len(rows):
        raise UserError(
            f"data.proxy.size: must be 0, because no training rows are divided, got {size}; set "
            "data.proxy.source"
        )
    if size >= len(complete):
        raise UserError(
            f"data.proxy.size: must be < {len(complete)}, the number of training rows{detail}, "
            f"got {size}"
        )
    try:
        held, rest = hold_out(
            complete, size, generator, patient=train.patient, term=train.patient_term
        )
    except UserError as error:
        raise UserError(
            f"data.proxy.size={size}: {error}; set data.proxy.source to other data"
        ) from error
    y = train.y if config.proxy.labels else None
    located = Examples(train.x, y, train.group, train.group_names, row=train.row, files=train.files)
    if names is None:
        return RowSelection(located, held), rest
    # The rows without values in some public columns remain.
    rows = rows[~torch.isin(rows, held)]
    if train.patient is not None:
        rows = rows[~torch.isin(train.patient[rows], train.patient[held])]
    public = located.select_rows(held)
    kept = dataset.layout.keep_columns(x[held], names, PROXY_COLUMNS)
    return RowSelection.all_rows(replace(public, x=kept)), rows


def _load_proxy_set(
    dataset: Dataset,
    config: DataConfig,
    profiles: Sequence[SettingsProfile],
    server: PreprocessConfig | None,
    generator: torch.Generator,
) -> RowSelection:
    """Load `data.proxy.source` and convert the examples to the columns of the main data set."""
    source = config.proxy.source
    assert source is not None
    is_object = source.name.startswith(OBJECT_PREFIX)
    where = "proxy" if is_object else "data.proxy.source"
    size = config.proxy.size
    check_roles(source, config, where)
    roles: tuple[Key, ...] = ("label",) if config.proxy.labels else ()
    read = source_with_task(source, dataset.task, dataset.categories, main=config, roles=roles)
    root = Path(config.root).expanduser()
    y: Tensor | None = None
    if config.proxy.labels:
        own, y = _load_labeled(read, root, where, dataset)
    else:
        own = load_unlabeled(read, root, where, dataset.vocabulary)
    given = own.train
    name = where if is_object else f"{where}: {source.name}"
    # Clients for which all blocks are missing do not train on the proxy set.
    needed = required_columns((p.settings for p in profiles), dataset.layout)
    needed = set() if dataset.blocks else needed
    x = match_inputs(own, dataset, name, needed=needed, may_have_more=True)
    if config.proxy.columns is not None:
        x = dataset.layout.keep_columns(x, config.proxy.columns, PROXY_COLUMNS)
    clients = {profile.first: profile.settings for profile in profiles}
    check_same_shape(tuple(x.shape[1:]), where, clients=clients, common=dataset, server=server)
    examples = Examples(
        x,
        y,
        row=given.row,
        files=given.files,
        patient=given.patient,
        patient_names=given.patient_names,
    )
    proxy = RowSelection.all_rows(examples)
    if 0 < size < len(x):
        proxy = RowSelection(proxy.examples, hold_out(proxy.rows, size, generator)[0])
    return proxy
