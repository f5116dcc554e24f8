"""Data from outside the common source: a client's own set, a public proxy set; matched to what all have in common."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from hetero_fl.config.source import SourceConfig, TextConfig
from hetero_fl.data.base import Dataset, Examples
from hetero_fl.data.layout import Block, Categories, Layout, spans_of
from hetero_fl.data.npz import read_images
from hetero_fl.data.registry import load_source, takes
from hetero_fl.data.sources.folder import image_files, read_image_files
from hetero_fl.data.tokens import Vocabulary
from hetero_fl.errors import UserError, nearest
from hetero_fl.own_code import OWN
from hetero_fl.task import Task

TOKENS = "give both the same `text` (length, tokenizer, vocabulary, public)"


def adopt(own: Dataset, common: Dataset, where: str, needed: Collection[str] | None = None) -> Examples:
    """The training rows of a client's own set, with the classes and the columns numbered as the common set's are.

    Named classes and columns are matched by name, and a client may lack classes; unnamed ones are matched by number. It may
    also lack columns that are not `needed` (none: all are).

    Raises:
        UserError: another kind of task, a class or a column that only one of the two has.
    """
    y = match_labels(own, common, where)
    if own.blocks or common.blocks:
        return replace(own.train, x=match_blocks(own.train.x, own.blocks, common, f"{where}: {own.name}", needed), y=y)
    if any(pair not in common.categories for pair in own.categories):
        raise UserError(
            f"{where}.categories: {own.name} encodes other values than the common set {common.name}; set data.categories alone"
        )
    x, extra = match_columns(own.train.x, own.columns, common, f"{where}: {own.name}", needed)
    if extra:
        none = f"the common set {common.name} has none of that name"
        raise UserError(f"{where}: {own.name} has column '{extra[0]}', {none}{nearest(extra[0], common.columns)}")
    return replace(own.train, x=x, y=y)


def match_labels(own: Dataset, common: Dataset, where: str) -> Tensor:
    """Return the targets of a set's training rows, with classes numbered as the common set's are.

    Raises:
        UserError: Another vocabulary, another kind of task, or a class that the common set lacks.
    """
    mine, ours = own.task, common.task
    both = f"the common set {common.name} has"
    none = f"{both} none of that name"
    if own.vocabulary != common.vocabulary:
        raise UserError(f"{where}: {own.name} has another vocabulary than the common set {common.name}: {TOKENS}")
    if mine.kind != ours.kind:
        raise UserError(f"{where}: {own.name} is {mine.kind}, {both} a {ours.kind} task")
    y = own.train.y
    assert y is not None  # load_source checked it
    if mine.kind == "multiclass" and mine.names and ours.names:
        for name in mine.names:
            if name not in ours.names:
                raise UserError(f"{where}: {own.name} has class '{name}', {none}{nearest(name, ours.names)}")
        y = torch.tensor([ours.names.index(name) for name in mine.names])[y]
    elif ours.numbers and not mine.names:
        y = from_labels(y, ours, f"{where}: {own.name}")
    elif mine.outputs != ours.outputs and (mine.names or mine.kind != "multiclass" or mine.outputs > ours.outputs):
        noun = "classes" if mine.kind == "multiclass" else "targets"
        raise UserError(f"{where}: {own.name} has {mine.outputs} {noun}, {both} {ours.outputs}")
    elif mine.kind != "multiclass" and mine.names and ours.names and mine.names != ours.names:
        raise UserError(f"{where}: {own.name} has targets {', '.join(mine.names)}, {both} {', '.join(ours.names)}")
    return y


def from_labels(y: Tensor, task: Task, where: str) -> Tensor:
    """Return the classes of a task that are named after these integer labels.

    Raises:
        UserError: A label that no class is named after.
    """
    numbers = torch.tensor(task.numbers)
    known = torch.isin(y, numbers)
    if not bool(known.all()):
        row = int((~known).to(torch.uint8).argmax())
        raise UserError(f"{where}: found label {int(y[row])} in row {row}{nearest(int(y[row]), task.names)}")
    return (y[:, None] == numbers).to(torch.uint8).argmax(1)


def read_as(
    source: SourceConfig, task: Task, text: TextConfig | None = None, categories: Categories = ()
) -> SourceConfig:
    """Return the source of a table, to be read for the task that the others have, unless it says otherwise: one file of a
    federation may hold two of many classes, or whole numbers by chance. Text columns are encoded by the common `categories`,
    whatever values this file has; texts are cut and numbered as the others' are."""
    if takes(source.name, "text") and source.text is None:
        return source.model_copy(update={"text": text})
    if source.name != "table":
        return source
    common = {"task": task.kind, "categories": dict(categories)}
    return source.model_copy(update={key: value for key, value in common.items() if getattr(source, key) is None})


def match_columns(
    x: Tensor, found: tuple[str, ...], common: Dataset, where: str, needed: Collection[str] | None = None
) -> tuple[Tensor, list[str]]:
    """The columns (last axis) of the common set, in its order, and the names of those that it lacks. Unnamed ones stay. A
    column that is missing is NaN; an indicator whose text column is there has another value in every row, and is 0.

    Raises:
        UserError: a column of the common set is missing that is among the `needed` (none: all are).
    """
    if not found or not common.columns:
        return x, []
    encoded = common.layout.encoded
    known = tuple(f"{column}=" for column, _ in common.categories)
    there = {encoded[name] for name in found if name in encoded}
    absent = [name for name in common.columns if name not in found and encoded.get(name) not in there]
    for name in absent:
        column = encoded.get(name, name)
        if needed is None or name in needed or column in needed:
            raise UserError(
                f"{where} has no column '{column}', the common set {common.name} has{nearest(column, found)}"
            )
    gap = x.new_full((*x.shape[:-1], 1), torch.nan)
    x = torch.cat([x, gap, torch.zeros_like(gap)], -1) if set(common.columns) - set(found) else x
    places = [found.index(n) if n in found else len(found) + (n not in absent) for n in common.columns]
    return x[..., places], [name for name in found if name not in common.columns and not name.startswith(known)]


def match_blocks(
    x: Tensor, found: tuple[Block, ...], common: Dataset, where: str, needed: Collection[str] | None = None
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
        found, x = tuple(alike[:1]), (x.float() / 255 if x.dtype == torch.uint8 else x).flatten(1)
        if len(alike) != 1:
            known = ", ".join(f"{b.name} {b.shape}" for b in common.blocks)
            raise UserError(f"{where}: examples are no block of {common.name}, which has {known or 'none'}")
    given = {b.name: x[:, start:stop] for b, (start, stop) in zip(found, spans_of(found), strict=True)}
    shapes, ours = {b.name: b.shape for b in found}, {b.name: b.shape for b in common.blocks}
    for name, shape in shapes.items():
        if ours.get(name) != shape:
            hint = nearest(name, ours) if name not in ours else f"; there it has shape {ours[name]}"
            raise UserError(f"{where} has block '{name}' of shape {shape}, the common set {common.name} has none{hint}")
    for name in ours:
        if name not in given and (needed is None or name in needed):
            raise UserError(f"{where} has no block '{name}', the common set {common.name} has{nearest(name, given)}")
    return torch.cat([given.get(b.name, x.new_full((len(x), b.size), torch.nan)) for b in common.blocks], 1)


def limited(x: Tensor, names: Sequence[str], layout: Layout, where: str) -> Tensor:
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
        loose = None if config.path is None else _loose(config, Path(config.path).expanduser())
    except UserError as error:
        raise UserError(f"{where}.{error}") from error
    if loose is None:
        dataset = load_source(config, root, where, missing=True)
        if dataset.vocabulary != vocabulary:
            raise UserError(f"{where}: {config.name} has another vocabulary than the common set: {TOKENS}")
        return dataset.train.x, dataset.columns, dataset.blocks
    if vocabulary is not None:
        raise UserError(f"{where}.path: {config.path} holds no text, and the common set's examples are tokens")
    x, columns = loose
    if bool(torch.isinf(x).any()) or (x.ndim > 2 and bool(torch.isnan(x).any())):
        raise UserError(f"{where}.path: {config.path}: NaN or infinity among the examples")
    return x, columns, ()


def load_labeled(config: SourceConfig, root: Path, where: str, common: Dataset) -> tuple[Dataset, Tensor]:
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


def _loose(config: SourceConfig, path: Path) -> tuple[Tensor, tuple[str, ...]] | None:
    """The examples of a local file or folder that needs no labels, or None if it is none of that kind."""
    if config.name.startswith(OWN):
        return None
    if path.suffix == ".npz":
        return read_images(path), ()
    if config.name == "table" and config.label is None:
        from hetero_fl.data.sources.cells import decimal_commas  # as in `table`: only then is pandas loaded
        from hetero_fl.data.sources.frames import read_frame
        from hetero_fl.data.sources.tabular import features

        categories = config.categories or {}
        frame, _ = decimal_commas(read_frame(path, categories), f"path: {path}", categories)
        x, columns, _ = features(frame, f"path: {path}", [], categories)
        return x, columns
    if config.name == "image_folder" and (files := image_files(path)) and all(f.parent == path for f in files):
        return read_image_files(files, config.size), ()
    return None
