"""Read recordings from tables: sensor samples and hourly series."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from pandas.api import types

from hetero_fl.config.data import ReadConfig, SeriesConfig, WindowsConfig
from hetero_fl.core.task import Task
from hetero_fl.data.checks import first_true
from hetero_fl.data.dataset import Dataset, Examples, PatientTerm
from hetero_fl.data.sources.npz_files import check_classes
from hetero_fl.data.sources.tables.columns import (
    check_columns,
    parse_names,
    parse_numbers,
    raise_cell_error,
    read_frame,
    require_no_missing,
)
from hetero_fl.data.sources.tables.frames import features
from hetero_fl.data.sources.traffic import HOUR, HourlySeries, split_sites
from hetero_fl.utils.arrays import index_names
from hetero_fl.utils.errors import UserError

RECORDINGS = PatientTerm("recording", "data.windows keeps windows that overlap together")


def read_samples(
    path: Path,
    windows: WindowsConfig,
    label: str | None = None,
    group: str | None = None,
    read: ReadConfig | None = None,
) -> Dataset:
    """Read labeled sensor windows `[N, T, F]` from a table of samples.

    A `.csv`, `.tsv` or `.parquet` file has one row per sample, in chronological order, with the
    columns `activity` and optionally `person`. All other numeric columns are channels. Consecutive
    rows of one person and activity are divided into windows of `windows.length` samples, where a
    window starts every `windows.step` samples. Remaining samples are dropped. Overlapping windows
    are never divided between splits.

    Args:
        path: File to read.
        windows: Window settings.
        label: Column of the activities. If None, `activity`.
        group: Column of the persons. If None, `person` is used if it exists.
        read: Separators and decimal mark of a CSV or TSV file. If None, a decimal point and
            the separator of the header.

    Raises:
        UserError: If the file is malformed. The message names the column and the row.
    """
    frame = read_frame(path, (group or "person",), read=read)
    label = label or "activity"
    where = f"path: {path}"
    group = group or ("person" if "person" in frame.columns else None)
    special = {"label": label, "group": group, "windows.time": windows.time}
    check_columns(frame, special.items(), path)
    y, classes = index_names(parse_names(frame[label], where))
    person, persons = (
        index_names(parse_names(frame[group], where))
        if group
        else (torch.zeros(len(frame), dtype=torch.int64), ())
    )
    rest = frame.drop(columns=[name for name in special.values() if name is not None])
    x, columns, _ = features(rest, where)
    # A run consists of consecutive rows with one activity and person.
    _, run, sizes = torch.unique_consecutive(
        y * max(1, len(persons)) + person, return_inverse=True, return_counts=True
    )
    if windows.time is not None:
        _check_time(frame[windows.time], run.numpy(), where)
    step = windows.step or windows.length
    runs = torch.arange(len(run)).split(sizes.tolist())
    found = [rows.unfold(0, windows.length, step) for rows in runs if len(rows) >= windows.length]
    if not found:
        raise UserError(
            f"windows.length: must be <= {int(sizes.max())}, the most consecutive samples of one "
            f"person and activity in {path}, got {windows.length}"
        )
    rows = torch.cat(found)
    starts = rows[:, 0]
    examples = Examples(x[rows], y[starts])
    if persons:
        examples.group = person[starts]
        examples.group_names = persons
    if step < windows.length:
        examples.patient = run[starts]
        examples.patient_term = RECORDINGS
    task = Task("multiclass", len(classes), classes)
    check_classes(task, path)
    return Dataset(
        "activity",
        task,
        examples,
        about=f"{len(examples):,} windows of {path.name}, {windows.length} samples of "
        f"{len(columns)} channels",
        columns=columns,
    )


def _check_time(column: pd.Series, run: np.ndarray, where: str) -> None:
    """Reject times that do not increase within a run."""
    times = parse_numbers(column, where)
    if times is None:
        times = read_dates(column, None, where).to_numpy("datetime64[ns]").astype(np.int64)
    not_increasing = (np.diff(times) <= 0) & (np.diff(run) == 0)
    if (index := first_true(not_increasing)) is not None:
        raise_cell_error(
            where,
            index + 1,
            str(column.name),
            f"times must increase, got '{column.iloc[index + 1]}' after '{column.iloc[index]}'",
        )


DATE_FORMAT = "YYYY-MM-DD hh:mm"
"""Form of dates in error messages."""


def read_hours(
    frame: pd.DataFrame, path: Path, config: SeriesConfig, label: str, group: str | None
) -> list[HourlySeries]:
    """Read the hourly series of the sites of a table (see `split_sites`).

    Args:
        frame: Table with one row per hour and site.
        path: File of the table, for error messages. Rows in messages count from 1 below the header.
        config: Series settings.
        label: Column of the values.
        group: Column of the sites. If None, all rows belong to one site.

    Raises:
        UserError: If a column is missing, a cell is not a number, or a date is invalid.
    """
    where = f"path: {path}"
    default = SeriesConfig()
    # The default columns of lanes and weather are optional.
    keys = [key for key in ("lanes", "weather") if getattr(config, key) != getattr(default, key)]
    named = [(f"series.{key}", column) for key in keys for column in getattr(config, key)]
    required = [("series.time", config.time), ("label", label), ("group", group), *named]
    check_columns(frame, required, path)
    if len(frame) == 0:
        raise UserError(f"{where}: has no rows")
    skips_gaps = config.gaps == "skip"
    columns = {label: read_numbers(frame[label], where, [] if skips_gaps else None)}
    for name in (*config.lanes, *config.weather):
        if name in frame.columns:
            columns[name] = read_numbers(frame[name], where, [])
    owners = parse_names(frame[group], where) if group else [path.stem] * len(frame)
    hours = _hours(frame[config.time], config, where)
    return split_sites(
        hours,
        owners,
        columns,
        config,
        label=label,
        path=path,
        first_row=1,
        skips_gaps=skips_gaps,
    )


def read_numbers(column: pd.Series, where: str, gaps: list[str] | None) -> np.ndarray:
    """Return a column as float64, with NaN for missing values unless `gaps` is None."""
    values = parse_numbers(column, where, gaps)
    if values is None:
        found = column.iloc[0]
        raise_cell_error(where, 0, str(column.name), f"expected a number, got '{found}'")
    return values


def _hours(column: pd.Series, config: SeriesConfig, where: str) -> np.ndarray:
    """Convert dates to hours since 1970, int64 `[N]`."""
    require_no_missing(column, where)
    dates = read_dates(column, config.format, where, "; set series.format for another format")
    seconds = dates.to_numpy().astype("datetime64[s]").astype(np.int64)
    if (row := first_true(seconds % HOUR != seconds[0] % HOUR)) is not None:
        raise_cell_error(
            where,
            row,
            str(column.name),
            f"dates must be whole hours apart, got '{column.iloc[row]}' and '{column.iloc[0]}'",
        )
    return seconds // HOUR


def read_dates(column: pd.Series, form: str | None, where: str, hint: str = "") -> pd.Series:
    """Parse dates in a format or, by default, in that of ISO 8601.

    Args:
        column: Column of dates, which may be text.
        form: Format of the dates. If None, ISO 8601.
        where: Name of the file, for error messages.
        hint: End of the error message if `form` is None.
    """
    if types.is_datetime64_any_dtype(column):
        return column if getattr(column.dt, "tz", None) is None else column.dt.tz_convert(None)
    text = column.astype(str).str.strip()
    parsed = pd.to_datetime(text, format=form or "ISO8601", errors="coerce", utc=True)
    if (row := first_true(parsed.isna().to_numpy())) is not None:
        expected = f"series.format={form}" if form else DATE_FORMAT
        problem = f"expected a date as {expected}, got '{text.iloc[row]}'"
        raise_cell_error(where, row, str(column.name), problem + ("" if form else hint))
    return parsed.dt.tz_convert(None)
