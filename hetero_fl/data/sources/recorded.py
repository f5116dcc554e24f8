"""Recordings of sensors from a file: windows that are cut already (`.npz`), or samples in a table, a row each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from hetero_fl.config.source import WindowsConfig
from hetero_fl.data.base import Dataset, Examples, places
from hetero_fl.data.npz import unreadable
from hetero_fl.data.sources.cells import decimal_commas, first, names, numbers, refuse
from hetero_fl.data.sources.frames import read_frame
from hetero_fl.data.sources.tabular import features
from hetero_fl.errors import UserError, beside, nearest
from hetero_fl.task import Task


def read_recorded(path: Path, windows: WindowsConfig, label: str | None = None, group: str | None = None) -> Dataset:
    """Windows `[N, T, F]` of a file.

    `.npz`: arrays `x` `[N, T, F]`, `y` `[N]` (what was done, names or numbers) and, if there are several, `person` `[N]`;
    `columns` may name the F channels. `label` and `group` name other arrays than `y` and `person`.

    `.csv`, `.tsv`, `.parquet`: a row a sample, in the order of time. The columns `label` (`activity`) and `group` (`person`)
    say what was done and by whom; all other columns of numbers are channels. A run of rows of one person and activity is
    cut into windows of `windows.length` samples, a new one every `windows.step`; what is left over at its end is dropped.
    Windows that overlap are never split up between training and test.

    Raises:
        UserError: one line with the file, the array or the column, and the row.
    """
    if path.suffix.lower() == ".npz":
        return _windows(path, label or "y", group or "person", group is not None)
    return _cut(read_frame(path, (group or "person",)), path, windows, label or "activity", group)


def _windows(path: Path, label: str, group: str, wanted: bool) -> Dataset:
    where = f"path: {path}"
    if not path.is_file():
        raise UserError(f"{where}: no such file{beside(path)}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except Exception as error:  # a damaged file makes zipfile, zlib and numpy raise a dozen kinds of errors
        raise UserError(f"{where}: not a readable .npz file{unreadable(path, error)}") from error
    for name in ("x", label, *((group,) if wanted else ())):
        if name not in arrays:
            raise UserError(f"{where}: no array '{name}'{nearest(name, arrays)}")
    x = arrays["x"]
    if x.ndim != 3 or x.dtype.kind not in "iuf" or 0 in x.shape:
        raise UserError(
            f"{where}: x: found {x.dtype} of shape {x.shape}; want numbers of shape (windows, samples, channels)"
        )
    for name in (label, group):
        if name in arrays and arrays[name].shape != (len(x),):
            raise UserError(f"{where}: {name}: found shape {arrays[name].shape}; want {(len(x),)}, as x has windows")
    if not np.isfinite(x).all():
        row, sample, channel = np.argwhere(~np.isfinite(x))[0]
        raise UserError(f"{where}: x: NaN or infinity in window {row}, sample {sample}, channel {channel}")
    columns = tuple(map(str, arrays["columns"])) if "columns" in arrays else ()
    if columns and len(columns) != x.shape[2]:
        raise UserError(f"{where}: columns: found {len(columns)} names for {x.shape[2]} channels")
    y, classes = places(arrays[label].tolist())
    whose = places(arrays[group].tolist()) if group in arrays else (None, ())
    examples = Examples(torch.from_numpy(x.astype(np.float32)), y, *whose)
    return _dataset(path, examples, classes, columns)


def _cut(frame: pd.DataFrame, path: Path, windows: WindowsConfig, label: str, group: str | None) -> Dataset:
    where = f"path: {path}"
    group = group or ("person" if "person" in frame.columns else None)
    known = {"label": label, "group": group, "windows.time": windows.time}
    for key, name in known.items():
        if name is not None and name not in frame.columns:
            raise UserError(f"{key}: {path} has no column '{name}'{nearest(name, map(str, frame.columns))}")
    y, classes = places(names(frame[label], where))
    whose, persons = places(names(frame[group], where)) if group else (torch.zeros(len(frame), dtype=torch.int64), ())
    rest, _ = decimal_commas(frame.drop(columns=[name for name in known.values() if name is not None]), where)
    x, columns, _ = features(rest, where)
    run = _runs(y, whose)
    if windows.time is not None:
        _check_time(frame[windows.time], run.numpy(), where)
    starts, bouts = _starts(run, windows.length, windows.step or windows.length)
    if not len(starts):
        longest = int(torch.bincount(run).max())
        raise UserError(
            f"{where}: no run of one person and activity has {windows.length} samples (windows.length), the longest has {longest}"
        )
    rows = starts[:, None] + torch.arange(windows.length)
    examples = Examples(x[rows], y[starts])
    if persons:
        examples.group, examples.group_names = whose[starts], persons
    if (windows.step or windows.length) < windows.length:
        examples.patient = bouts
    return _dataset(path, examples, classes, columns)


def _dataset(path: Path, examples: Examples, classes: tuple[str, ...], columns: tuple[str, ...]) -> Dataset:
    if len(classes) < 2:
        raise UserError(f"label: {path} has one class only ({', '.join(classes)}); there is nothing to tell apart")
    about = f"{len(examples):,} windows of {path.name}, {examples.x.shape[1]} samples of {examples.x.shape[2]} channels"
    return Dataset("activity", Task("multiclass", len(classes), classes), examples, about=about, columns=columns)


def _runs(y: Tensor, whose: Tensor) -> Tensor:
    """The number of each row's run of equal activity and person, int64 `[N]`."""
    change = (y[1:] != y[:-1]) | (whose[1:] != whose[:-1])
    return torch.cat([torch.zeros(1, dtype=torch.int64), change.cumsum(0)])


def _starts(run: Tensor, length: int, step: int) -> tuple[Tensor, Tensor]:
    """The first rows of all windows that lie within one run, and the runs that they are in."""
    sizes = torch.bincount(run)
    begins = sizes.cumsum(0) - sizes
    count = ((sizes - length) // step + 1).clamp(min=0)
    bouts = torch.repeat_interleave(torch.arange(len(sizes)), count)
    place = torch.arange(len(bouts)) - (count.cumsum(0) - count)[bouts]
    return begins[bouts] + step * place, bouts


def _check_time(column: pd.Series, run: np.ndarray, where: str) -> None:
    """Refuse times that run backwards within a run."""
    found = numbers(column, where)
    if found is None:
        parsed = pd.to_datetime(column, errors="coerce")
        if (row := first(parsed.isna())) is not None:
            refuse(where, row, str(column.name), f"found '{column.iloc[row]}', neither a number nor a date")
        found = parsed.to_numpy().astype("datetime64[ns]").astype(np.int64)
    back = np.flatnonzero((np.diff(found) <= 0) & (np.diff(run) == 0))
    if len(back):
        row = int(back[0]) + 1
        refuse(
            where,
            row,
            str(column.name),
            f"found '{column.iloc[row]}' after '{column.iloc[row - 1]}'; time must run forward",
        )
