"""Data from outside the common source: a client's own set, a public proxy set; matched to what all have in common."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from hetero_fl.config.source import SourceConfig
from hetero_fl.data.base import Dataset, Examples
from hetero_fl.data.npz import read_images
from hetero_fl.data.registry import load_source
from hetero_fl.data.sources.folder import image_files, read_image_files
from hetero_fl.data.sources.table import features, read_frame
from hetero_fl.errors import UserError, nearest


def adopt(own: Dataset, common: Dataset, where: str) -> Examples:
    """The training rows of a client's own set, with the classes and the columns numbered as the common set's are.

    Named classes and columns are matched by name, and a client may lack classes; unnamed ones are matched by number.

    Raises:
        UserError: another kind of task, a class or a column that only one of the two has.
    """
    mine, ours = own.task, common.task
    both = f"the common set {common.name} has"
    none = f"{both} none of that name"
    if mine.kind != ours.kind:
        raise UserError(f"{where}: {own.name} is {mine.kind}, {both} a {ours.kind} task")
    y = own.train.y
    assert y is not None  # load_source checked it
    if mine.kind == "multiclass" and mine.names and ours.names:
        for name in mine.names:
            if name not in ours.names:
                raise UserError(f"{where}: {own.name} has class '{name}', {none}{nearest(name, ours.names)}")
        y = torch.tensor([ours.names.index(name) for name in mine.names])[y]
    elif mine.outputs != ours.outputs and (mine.names or mine.kind != "multiclass" or mine.outputs > ours.outputs):
        noun = "classes" if mine.kind == "multiclass" else "targets"
        raise UserError(f"{where}: {own.name} has {mine.outputs} {noun}, {both} {ours.outputs}")
    elif mine.kind != "multiclass" and mine.names and ours.names and mine.names != ours.names:
        raise UserError(f"{where}: {own.name} has targets {', '.join(mine.names)}, {both} {', '.join(ours.names)}")
    x, extra = match_columns(own.train.x, own.columns, common, f"{where}: {own.name}")
    if extra:
        raise UserError(f"{where}: {own.name} has column '{extra[0]}', {none}{nearest(extra[0], common.columns)}")
    return Examples(x, y, own.train.group, own.train.group_names)


def match_columns(x: Tensor, found: tuple[str, ...], common: Dataset, where: str) -> tuple[Tensor, list[str]]:
    """The columns `[N, F]` of the common set, in its order, and the names of those that it lacks. Unnamed ones stay.

    Raises:
        UserError: a column of the common set is missing.
    """
    if not found or not common.columns:
        return x, []
    for name in common.columns:
        if name not in found:
            raise UserError(f"{where} has no column '{name}', the common set {common.name} has{nearest(name, found)}")
    places = [found.index(name) for name in common.columns]
    return x[:, places], [name for name in found if name not in common.columns]


def load_unlabelled(config: SourceConfig, root: Path, where: str) -> tuple[Tensor, tuple[str, ...]]:
    """The training examples of a source and the names of its columns. No label leaves this function; those of local
    files need not even be there: an .npz with `train_images` alone, a table without `label`, a folder of loose images.

    Raises:
        UserError: see `load_source`.
    """
    try:
        loose = None if config.path is None else _loose(config, Path(config.path).expanduser())
    except UserError as error:
        raise UserError(f"{where}.{error}") from error
    if loose is None:
        dataset = load_source(config, root, where)
        return dataset.train.x, dataset.columns
    if not bool(torch.isfinite(loose[0]).all()):
        raise UserError(f"{where}.path: {config.path}: NaN or infinity among the examples")
    return loose


def _loose(config: SourceConfig, path: Path) -> tuple[Tensor, tuple[str, ...]] | None:
    """The examples of a local file or folder that needs no labels, or None if it is none of that kind."""
    if config.name.startswith("python:"):
        return None
    if path.suffix == ".npz":
        return read_images(path), ()
    if config.name == "table" and config.label is None:
        x, columns, _ = features(read_frame(path), f"path: {path}")
        return x, columns
    if config.name == "image_folder" and (files := image_files(path)) and all(f.parent == path for f in files):
        return read_image_files(files), ()
    return None
