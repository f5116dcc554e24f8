"""Read recordings from tables: sensor samples and hourly series."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import numpy as np
import pandas as pd
import torch
from pandas.api import types
from torch import Tensor

from hetero_fl.config.data import ReadConfig, SeriesConfig, WindowsConfig
from hetero_fl.core.task import Task
from hetero_fl.data.checks import first_true
from hetero_fl.data.dataset import Dataset, Examples, PatientTerm, index_names
from hetero_fl.data.sources.npz_columns import check_classes
from hetero_fl.data.sources.table_columns import (
    check_columns,
    parse_names,
    parse_numbers,
    raise_cell_error,
    require_no_missing,
    to_numbers,
)
from hetero_fl.data.sources.table_files import features, read_frame
from hetero_fl.data.sources.traffic import HOUR, HourlySeries
from hetero_fl.utils.errors import UserError, check_names
from hetero_fl.utils.ordering import natural_order
from hetero_fl.utils.text import pluralize

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
    run = _run_numbers(y, person)
    if windows.time is not None:
        _check_time(frame[windows.time], run.numpy(), where)
    starts, window_runs = _window_starts(run, windows.length, windows.step or windows.length)
    if not len(starts):
        longest = int(torch.bincount(run).max())
        raise UserError(
            f"windows.length: must be <= {longest}, the most consecutive samples of one person and "
            f"activity in {path}, got {windows.length}"
        )
    rows = starts[:, None] + torch.arange(windows.length)
    examples = Examples(x[rows], y[starts])
    if persons:
        examples.group = person[starts]
        examples.group_names = persons
    if (windows.step or windows.length) < windows.length:
        examples.patient = window_runs
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


def _run_numbers(y: Tensor, person: Tensor) -> Tensor:
    """Return the index of the run of each row, int64 `[N]`.

    A run consists of consecutive rows with one activity and person.
    """
    change = (y[1:] != y[:-1]) | (person[1:] != person[:-1])
    return torch.cat([torch.zeros(1, dtype=torch.int64), change.cumsum(0)])


def _window_starts(run: Tensor, length: int, step: int) -> tuple[Tensor, Tensor]:
    """Return the first row and the run of each window, int64 `[W]` each."""
    sizes = torch.bincount(run)
    begins = sizes.cumsum(0) - sizes
    count = ((sizes - length) // step + 1).clamp(min=0)
    window_runs = torch.repeat_interleave(torch.arange(len(sizes)), count)
    index_in_run = torch.arange(len(window_runs)) - (count.cumsum(0) - count)[window_runs]
    return begins[window_runs] + step * index_in_run, window_runs


def _check_time(column: pd.Series, run: np.ndarray, where: str) -> None:
    """Reject times that do not increase within a run."""
    times = parse_numbers(column, where)
    if times is None:
        parsed = pd.to_datetime(column, format="ISO8601", errors="coerce")
        if (row := first_true(parsed.isna())) is not None:
            raise_cell_error(
                where,
                row,
                str(column.name),
                f"expected a number or a date as {DATE_FORMAT}, got '{column.iloc[row]}'",
            )
        times = parsed.to_numpy().astype("datetime64[ns]").astype(np.int64)
    not_increasing = np.flatnonzero((np.diff(times) <= 0) & (np.diff(run) == 0))
    if len(not_increasing):
        row = int(not_increasing[0]) + 1
        raise_cell_error(
            where,
            row,
            str(column.name),
            f"times must increase, got '{column.iloc[row]}' after '{column.iloc[row - 1]}'",
        )


DATE_FORMAT = "YYYY-MM-DD hh:mm"
"""Form of dates in error messages."""


def read_sites(
    frame: pd.DataFrame, path: Path, config: SeriesConfig, label: str, group: str | None
) -> list[HourlySeries]:
    """Read the hourly series of the sites of a file, in the natural order of their names.

    Args:
        frame: Table with one row per hour and site.
        path: File of the table, for error messages. Rows in messages count from 1 below the header.
        config: Series settings.
        label: Column of the values.
        group: Column of the sites. If None, all rows belong to one site.

    Raises:
        UserError: If a column is missing, a cell is not a number, a date is invalid, the rows of a
            site are unsorted, duplicated or not a whole number of hours apart, or hours are missing
            and `series.gaps: skip` is not set.
    """
    where = f"path: {path}"
    required: list[tuple[str, str | None]] = [
        ("series.time", config.time),
        ("label", label),
        ("group", group),
    ]
    default = SeriesConfig()
    # The default columns of lanes and weather are optional.
    keys = [key for key in ("lanes", "weather") if getattr(config, key) != getattr(default, key)]
    required += [(f"series.{key}", column) for key in keys for column in getattr(config, key)]
    check_columns(frame, required, path)
    if len(frame) == 0:
        raise UserError(f"{where}: has no rows")
    value = _numbers(frame[label], where, config.gaps == "skip")
    site = parse_names(frame[group], where) if group else pd.Series(path.stem, index=frame.index)
    known = natural_order(set(site))
    if config.sites is not None:
        check_names(config.sites, known, "series.sites: site", f" not found in {path}")
        known = [name for name in known if name in config.sites]
    rows = {name: np.flatnonzero((site == name).to_numpy()) for name in known}
    hours = _hours(frame[config.time], config, where)
    lanes = _extra_columns(frame, config.lanes, where)
    weather = _extra_columns(frame, config.weather, where)
    series = []
    for name, site_rows in rows.items():
        dates = frame[config.time]
        _check_order(hours, site_rows, name, dates, where)
        if config.gaps == "refuse":
            _check_missing_hours(hours, site_rows, name, dates, where)
        position = hours[site_rows] - hours[site_rows[0]]
        columns = []
        for column in (value, lanes, weather):
            hourly = np.full((position[-1] + 1, *column.shape[1:]), np.nan)
            hourly[position] = column[site_rows]
            columns.append(hourly)
        series.append(HourlySeries(name, int(hours[site_rows[0]]), *columns))
    return series


def _numbers(column: pd.Series, where: str, allow_missing: bool) -> np.ndarray:
    """Return a column as float64, with NaN for missing values if `allow_missing` is set."""
    if allow_missing and not column.notna().any():
        raise UserError(f"{where}: column '{column.name}': has no values")
    if allow_missing:
        return _column_with_missing(column, where)
    values = parse_numbers(column, where)
    if values is None:
        _raise_not_a_number(column, 0, where)
    return values


def _column_with_missing(column: pd.Series, where: str) -> np.ndarray:
    """Return a column as float64, with NaN for empty cells."""
    values = to_numbers(column).to_numpy(dtype=np.float64)
    invalid = np.isnan(values) & column.notna().to_numpy() | np.isinf(values)
    if (row := first_true(invalid)) is not None:
        _raise_not_a_number(column, row, where)
    return values


def _raise_not_a_number(column: pd.Series, row: int, where: str) -> NoReturn:
    raise_cell_error(where, row, str(column.name), f"expected a number, got '{column.iloc[row]}'")


def _extra_columns(frame: pd.DataFrame, columns: tuple[str, ...], where: str) -> np.ndarray:
    """Return optional columns, float64 `[N, C]`. Columns that do not exist are NaN."""
    empty = np.full(len(frame), np.nan)
    values = [
        _column_with_missing(frame[name], where) if name in frame.columns else empty
        for name in columns
    ]
    return np.stack(values, 1) if values else np.zeros((len(frame), 0))


def _hours(column: pd.Series, config: SeriesConfig, where: str) -> np.ndarray:
    """Convert dates to hours since 1970, int64 `[N]`."""
    require_no_missing(column, where)
    if types.is_datetime64_any_dtype(column):
        dates = column.dt.tz_convert(None) if getattr(column.dt, "tz", None) is not None else column
    else:
        dates = _dates(column.astype(str).str.strip(), config, where)
    seconds = dates.to_numpy().astype("datetime64[s]").astype(np.int64)
    if (row := first_true(seconds % HOUR != seconds[0] % HOUR)) is not None:
        raise_cell_error(
            where,
            row,
            str(column.name),
            f"dates must be whole hours apart, got '{column.iloc[row]}' and '{column.iloc[0]}'",
        )
    return seconds // HOUR


def _dates(text: pd.Series, config: SeriesConfig, where: str) -> pd.Series:
    """Parse dates in the configured format or, by default, in that of ISO 8601."""
    parsed = pd.to_datetime(text, format=config.format or "ISO8601", errors="coerce", utc=True)
    if (row := first_true(parsed.isna().to_numpy())) is not None:
        expected = f"series.format={config.format}" if config.format else DATE_FORMAT
        hint = "" if config.format else "; set series.format for another format"
        raise_cell_error(
            where, row, config.time, f"expected a date as {expected}, got '{text.iloc[row]}'{hint}"
        )
    return parsed.dt.tz_convert(None)


def _check_order(
    hours: np.ndarray, site_rows: np.ndarray, name: str, dates: pd.Series, where: str
) -> None:
    """Reject duplicate or unsorted dates of a site. `site_rows` are the site's row indices."""
    column = str(dates.name)
    unique, first_index = np.unique(hours[site_rows], return_index=True)
    if len(unique) < len(site_rows):
        duplicate = np.setdiff1d(np.arange(len(site_rows)), first_index)[0]
        first = int(np.flatnonzero(hours[site_rows] == hours[site_rows[duplicate]])[0])
        row = int(site_rows[duplicate])
        raise_cell_error(
            where,
            row,
            column,
            f"duplicate date '{dates.iloc[row]}' of site '{name}', first in row "
            f"{site_rows[first] + 1}",
        )
    if (index := first_true(np.diff(hours[site_rows]) < 0)) is not None:
        previous = site_rows[index]
        row = int(site_rows[index + 1])
        raise_cell_error(
            where,
            row,
            column,
            f"rows of site '{name}' must be sorted by date, got '{dates.iloc[row]}' after "
            f"'{dates.iloc[previous]}'",
        )


def _check_missing_hours(
    hours: np.ndarray, site_rows: np.ndarray, name: str, dates: pd.Series, where: str
) -> None:
    """Reject missing hours of a site. `site_rows` are the site's row indices."""
    step = np.diff(hours[site_rows])
    if (index := first_true(step > 1)) is not None:
        row = int(site_rows[index + 1])
        raise_cell_error(
            where,
            row,
            str(dates.name),
            f"{pluralize(int(step[index]) - 1, 'hour')} of site '{name}' missing before "
            f"'{dates.iloc[row]}'; add them, or set series.gaps=skip",
        )
