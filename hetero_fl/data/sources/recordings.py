"""Read recordings: sensor samples or windows, and hourly series."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from pandas.api import types
from torch import Tensor

from hetero_fl.config.data import SeriesConfig, WindowsConfig
from hetero_fl.core.task import Task
from hetero_fl.data.arrays import read_npz_arrays
from hetero_fl.data.dataset import Dataset, Examples, index_names
from hetero_fl.data.sources.table_files import (
    check_columns,
    decimal_commas,
    features,
    first_true,
    parse_names,
    parse_numbers,
    raise_cell_error,
    read_frame,
    require_no_missing,
)
from hetero_fl.data.sources.traffic import HOUR, HourlySeries
from hetero_fl.utils.errors import UserError, check_names
from hetero_fl.utils.ordering import natural_order

# Recordings of sensors from a file: windows that are cut already (`.npz`), or samples in a table, a
# row each.


def read_recorded(
    path: Path, windows: WindowsConfig, label: str | None = None, group: str | None = None
) -> Dataset:
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
    arrays, names = read_npz_arrays(path, ("x", label, group, "columns"))
    check_names(["x", label, *([group] if wanted else [])], names, f"{where}: no array")
    x = arrays["x"]
    if x.ndim != 3 or x.dtype.kind not in "iuf" or 0 in x.shape:
        raise UserError(
            f"{where}: x: found {x.dtype} of shape {x.shape}; want numbers of shape (windows, samples, channels)"
        )
    for name in (label, group):
        if name in arrays and arrays[name].shape != (len(x),):
            raise UserError(
                f"{where}: {name}: found shape {arrays[name].shape}; want {(len(x),)}, as x has windows"
            )
    if not np.isfinite(x).all():
        row, sample, channel = np.argwhere(~np.isfinite(x))[0]
        raise UserError(
            f"{where}: x: NaN or infinity in window {row}, sample {sample}, channel {channel}"
        )
    columns = tuple(map(str, arrays["columns"])) if "columns" in arrays else ()
    if columns and len(columns) != x.shape[2]:
        raise UserError(f"{where}: columns: found {len(columns)} names for {x.shape[2]} channels")
    y, classes = index_names(arrays[label].tolist())
    whose = index_names(arrays[group].tolist()) if group in arrays else (None, ())
    examples = Examples(torch.from_numpy(x.astype(np.float32)), y, *whose)
    return _dataset(path, examples, classes, columns)


def _cut(
    frame: pd.DataFrame, path: Path, windows: WindowsConfig, label: str, group: str | None
) -> Dataset:
    where = f"path: {path}"
    group = group or ("person" if "person" in frame.columns else None)
    known = {"label": label, "group": group, "windows.time": windows.time}
    check_columns(frame, known.items(), path)
    y, classes = index_names(parse_names(frame[label], where))
    whose, persons = (
        index_names(parse_names(frame[group], where))
        if group
        else (torch.zeros(len(frame), dtype=torch.int64), ())
    )
    rest, _ = decimal_commas(
        frame.drop(columns=[name for name in known.values() if name is not None]), where
    )
    x, columns, _ = features(rest, where)
    run = _run_numbers(y, whose)
    if windows.time is not None:
        _check_time(frame[windows.time], run.numpy(), where)
    starts, bouts = _window_starts(run, windows.length, windows.step or windows.length)
    if not len(starts):
        longest = int(torch.bincount(run).max())
        raise UserError(
            f"{where}: no run of one person and activity has {windows.length} samples (windows.length), the longest has {longest}"
        )
    rows = starts[:, None] + torch.arange(windows.length)
    examples = Examples(x[rows], y[starts])
    if persons:
        examples.group = whose[starts]
        examples.group_names = persons
    if (windows.step or windows.length) < windows.length:
        examples.patient = bouts
    return _dataset(path, examples, classes, columns)


def _dataset(
    path: Path, examples: Examples, classes: tuple[str, ...], columns: tuple[str, ...]
) -> Dataset:
    if len(classes) < 2:
        raise UserError(
            f"label: {path} has one class only ({', '.join(classes)}); there is nothing to tell apart"
        )
    about = f"{len(examples):,} windows of {path.name}, {examples.x.shape[1]} samples of {examples.x.shape[2]} channels"
    return Dataset(
        "activity",
        Task("multiclass", len(classes), classes),
        examples,
        about=about,
        columns=columns,
    )


def _run_numbers(y: Tensor, whose: Tensor) -> Tensor:
    """The number of each row's run of equal activity and person, int64 `[N]`."""
    change = (y[1:] != y[:-1]) | (whose[1:] != whose[:-1])
    return torch.cat([torch.zeros(1, dtype=torch.int64), change.cumsum(0)])


def _window_starts(run: Tensor, length: int, step: int) -> tuple[Tensor, Tensor]:
    """The first rows of all windows that lie within one run, and the runs that they are in."""
    sizes = torch.bincount(run)
    begins = sizes.cumsum(0) - sizes
    count = ((sizes - length) // step + 1).clamp(min=0)
    bouts = torch.repeat_interleave(torch.arange(len(sizes)), count)
    place = torch.arange(len(bouts)) - (count.cumsum(0) - count)[bouts]
    return begins[bouts] + step * place, bouts


def _check_time(column: pd.Series, run: np.ndarray, where: str) -> None:
    """Refuse times that run backwards within a run."""
    found = parse_numbers(column, where)
    if found is None:
        parsed = pd.to_datetime(column, errors="coerce")
        if (row := first_true(parsed.isna())) is not None:
            raise_cell_error(
                where,
                row,
                str(column.name),
                f"found '{column.iloc[row]}', neither a number nor a date",
            )
        found = parsed.to_numpy().astype("datetime64[ns]").astype(np.int64)
    back = np.flatnonzero((np.diff(found) <= 0) & (np.diff(run) == 0))
    if len(back):
        row = int(back[0]) + 1
        raise_cell_error(
            where,
            row,
            str(column.name),
            f"found '{column.iloc[row]}' after '{column.iloc[row - 1]}'; time must run forward",
        )


# Files of what is counted by the hour: a row an hour and site, with the date, the value, and what
# else is measured.

EXAMPLE_ROWS = 20
FORMATS: tuple[str, ...] = (
    "%Y-%m-%d %H:%M",
    "%Y-%m-%d %H:%M:%S",
    "%Y-%m-%dT%H:%M:%S",
    "%Y-%m-%dT%H:%M",
)
FORMATS += tuple(
    f"{day} {clock}"
    for day in ("%m/%d/%Y", "%d/%m/%Y", "%d.%m.%Y")
    for clock in ("%H:%M", "%H:%M:%S")
)


def read_sites(
    frame: pd.DataFrame, path: Path, config: SeriesConfig, label: str, group: str | None
) -> list[HourlySeries]:
    """The sites of a file, in the order in which people count. Rows count from 1 below the header.

    Raises:
        UserError: a column that is missing; text in a number; a date that is none, or could be two; rows of a site that are not
            in the order of their dates, that are twice there, or not a whole number of hours apart; hours that are missing
            (unless gaps are skipped). With file, row and column.
    """
    where = f"path: {path}"
    wanted: list[tuple[str, str | None]] = [
        ("series.time", config.time),
        ("label", label),
        ("group", group),
    ]
    plain = SeriesConfig()
    # others may be absent
    named = [key for key in ("lanes", "weather") if getattr(config, key) != getattr(plain, key)]
    wanted += [(f"series.{key}", column) for key in named for column in getattr(config, key)]
    check_columns(frame, wanted, path)
    if len(frame) == 0:
        raise UserError(f"{where}: found no rows")
    value = _numbers(frame[label], where, config.gaps == "skip")
    site = parse_names(frame[group], where) if group else pd.Series(path.stem, index=frame.index)
    known = natural_order(set(site))
    if config.sites is not None:
        check_names(config.sites, known, f"series.sites: {path} has no site")
        known = [name for name in known if name in config.sites]
    rows = {name: np.flatnonzero((site == name).to_numpy()) for name in known}
    hours = _hours(frame[config.time], list(rows.values()), config, where)
    lanes = _extra_columns(frame, config.lanes, where)
    weather = _extra_columns(frame, config.weather, where)
    made = []
    for name, own in rows.items():
        _check_order(hours, own, name, frame[config.time], where, config.gaps == "refuse")
        place = hours[own] - hours[own[0]]

        series = []
        for column in (value, lanes, weather):
            hourly = np.full((place[-1] + 1, *column.shape[1:]), np.nan)
            hourly[place] = column[own]
            series.append(hourly)
        made.append(HourlySeries(name, int(hours[own[0]]), *series))
    return made


def _numbers(column: pd.Series, where: str, allow_missing: bool) -> np.ndarray:
    """A column of numbers, float64; missing ones are NaN if they may be."""
    if allow_missing and not column.notna().any():
        raise UserError(f"{where}: column '{column.name}' is empty")
    if allow_missing:
        return _column_with_missing(column, where)
    found = parse_numbers(column, where)
    if found is None:
        raise_cell_error(where, 0, str(column.name), f"found '{column.iloc[0]}', not a number")
    return found


def _column_with_missing(column: pd.Series, where: str) -> np.ndarray:
    """A column as float64 with NaN where it is empty. Raises UserError for text."""
    read = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64)
    if (row := first_true(np.isnan(read) & column.notna().to_numpy() | np.isinf(read))) is not None:
        raise_cell_error(where, row, str(column.name), f"found '{column.iloc[row]}', not a number")
    return read


def _extra_columns(frame: pd.DataFrame, columns: tuple[str, ...], where: str) -> np.ndarray:
    """Columns `[N, C]` of what is measured besides; NaN all over where the file lacks one."""
    empty = np.full(len(frame), np.nan)
    found = [
        _column_with_missing(frame[name], where) if name in frame.columns else empty
        for name in columns
    ]
    return np.stack(found, 1) if found else np.zeros((len(frame), 0))


def _hours(
    column: pd.Series, sites: list[np.ndarray], config: SeriesConfig, where: str
) -> np.ndarray:
    """Dates as hours since 1970, int64 `[N]`."""
    require_no_missing(column, where)
    if types.is_datetime64_any_dtype(column):
        dates = column.dt.tz_convert(None) if getattr(column.dt, "tz", None) is not None else column
    else:
        dates = _dates(column.astype(str).str.strip(), sites, config, where)
    seconds = dates.to_numpy().astype("datetime64[s]").astype(np.int64)
    if (row := first_true(seconds % HOUR != seconds[0] % HOUR)) is not None:
        raise_cell_error(
            where,
            row,
            str(column.name),
            f"found '{column.iloc[row]}', not a whole number of hours after the first date",
        )
    return seconds // HOUR


def _dates(text: pd.Series, sites: list[np.ndarray], config: SeriesConfig, where: str) -> pd.Series:
    """Dates in the format that is given, or in the only one that fits: every cell, and then the hours that it gives."""
    tried = [config.format] if config.format else list(FORMATS)
    # most formats are out after a look
    look = pd.concat([text.head(EXAMPLE_ROWS), text.tail(EXAMPLE_ROWS)])
    tried = [
        form
        for form in tried
        if not pd.to_datetime(look, format=form, errors="coerce").isna().any()
    ] or tried
    read = {form: pd.to_datetime(text, format=form, errors="coerce") for form in tried}
    whole = {form: dates for form, dates in read.items() if not dates.isna().any()}
    if not whole:
        best = max(read.values(), key=lambda dates: int(dates.notna().sum()))
        row = first_true(best.isna().to_numpy())
        assert row is not None
        known = re.sub(r"%(\w)", lambda m: {"Y": "YYYY", "m": "MM", "d": "DD", "H": "hh", "M": "mm", "S": "ss"}.get(m[1], m[0]),
                       config.format or FORMATS[0])  # fmt: skip
        remedy = "" if config.format else "; or say in series.format how dates are written"
        raise_cell_error(
            where, row, config.time, f"found '{text.iloc[row]}', not a date such as {known}{remedy}"
        )
    if len(whole) > 1:  # day before month or after: only one of them gives rows an hour apart
        steps = {form: _share_in_order(dates, sites) for form, dates in whole.items()}
        best_share = max(steps.values())
        whole = {form: dates for form, dates in whole.items() if steps[form] == best_share}
    if len(whole) > 1 and len({tuple(d.astype("int64")) for d in whole.values()}) > 1:
        forms = " or ".join(f"'{form}'" for form in whole)
        raise UserError(
            f"series.format: column '{config.time}' of {where.removeprefix('path: ')} may be {forms}; say which"
        )
    return next(iter(whole.values()))


def _share_in_order(dates: pd.Series, sites: list[np.ndarray]) -> float:
    """Share of the rows that come one hour after the row of the same site before them."""
    hours = dates.to_numpy().astype("datetime64[s]").astype(np.int64) / HOUR
    steps = [np.diff(hours[own]) for own in sites]
    total = sum(map(len, steps))
    return sum(int((s == 1).sum()) for s in steps) / total if total else 0.0


def _check_order(
    hours: np.ndarray, own: np.ndarray, name: str, dates: pd.Series, where: str, whole: bool
) -> None:
    """Refuse a site whose dates do not go up hour by hour."""
    column = str(dates.name)
    step = np.diff(hours[own])
    seen, again = np.unique(hours[own], return_index=True)
    if len(seen) < len(own):
        double = np.setdiff1d(np.arange(len(own)), again)[0]
        before = int(np.flatnonzero(hours[own] == hours[own[double]])[0])
        raise_cell_error(where, int(own[double]), column, f"found '{dates.iloc[own[double]]}' a second time for site '{name}'; "
               f"it stands in row {own[before] + 1}, too")  # fmt: skip
    if (place := first_true(step < 0)) is not None:
        late = own[place]
        row = int(own[place + 1])
        raise_cell_error(where, row, column, f"found '{dates.iloc[row]}' after '{dates.iloc[late]}' of the same site '{name}'; "
               "put the rows in the order of their dates")  # fmt: skip
    if whole and (place := first_true(step > 1)) is not None:
        row = int(own[place + 1])
        lacking = int(step[place]) - 1
        raise_cell_error(where, row, column, f"{lacking} hour{'' if lacking == 1 else 's'} of site '{name}' missing before "
               f"'{dates.iloc[row]}'; fill them in, or set series.gaps: skip")  # fmt: skip
