"""Files of what is counted by the hour: a row an hour and site, with the date, the value, and what else is measured."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
from pandas.api import types

from hetero_fl.config.source import SeriesConfig
from hetero_fl.data.sources.cells import first, missing, names, numbers, refuse
from hetero_fl.data.windows import HOUR, Site
from hetero_fl.errors import UserError, nearest
from hetero_fl.state import in_order

LOOK = 20
FORMATS: tuple[str, ...] = ("%Y-%m-%d %H:%M", "%Y-%m-%d %H:%M:%S", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M")
FORMATS += tuple(f"{day} {clock}" for day in ("%m/%d/%Y", "%d/%m/%Y", "%d.%m.%Y") for clock in ("%H:%M", "%H:%M:%S"))


def read_sites(frame: pd.DataFrame, path: Path, config: SeriesConfig, label: str, group: str | None) -> list[Site]:
    """The sites of a file, in the order in which people count. Rows count from 1 below the header.

    Raises:
        UserError: a column that is missing; text in a number; a date that is none, or could be two; rows of a site that are not
            in the order of their dates, that are twice there, or not a whole number of hours apart; hours that are missing
            (unless gaps are skipped). With file, row and column.
    """
    where = f"path: {path}"
    wanted = [("series.time", config.time), ("label", label), *([("group", group)] if group else [])]
    plain = SeriesConfig()
    named = [key for key in ("lanes", "weather") if getattr(config, key) != getattr(plain, key)]  # others may be absent
    wanted += [(f"series.{key}", column) for key in named for column in getattr(config, key)]
    for key, column in wanted:
        if column not in frame.columns:
            raise UserError(f"{key}: {path} has no column '{column}'{nearest(column, map(str, frame.columns))}")
    if len(frame) == 0:
        raise UserError(f"{where}: found no rows")
    value = _numbers(frame[label], where, config.gaps == "skip")
    site = names(frame[group], where) if group else pd.Series(path.stem, index=frame.index)
    known = in_order(set(site))
    if config.sites is not None:
        for name in config.sites:
            if name not in known:
                raise UserError(f"series.sites: {path} has no site '{name}'{nearest(name, known)}")
        known = [name for name in known if name in config.sites]
    rows = {name: np.flatnonzero((site == name).to_numpy()) for name in known}
    hours = _hours(frame[config.time], list(rows.values()), config, where)
    beside = {key: _beside(frame, getattr(config, key), where) for key in ("lanes", "weather")}
    made = []
    for name, own in rows.items():
        _check_order(hours, own, name, frame[config.time], where, config.gaps == "refuse")
        place = hours[own] - hours[own[0]]

        def spread(column: np.ndarray, own: np.ndarray = own, place: np.ndarray = place) -> np.ndarray:
            full = np.full((place[-1] + 1, *column.shape[1:]), np.nan)
            full[place] = column[own]
            return full

        made.append(Site(name, int(hours[own[0]]), spread(value), spread(beside["lanes"]), spread(beside["weather"])))
    return made


def _numbers(column: pd.Series, where: str, gaps: bool) -> np.ndarray:
    """A column of numbers, float64; missing ones are NaN if they may be."""
    known = column[column.notna()] if gaps else column
    if gaps and known.empty:
        raise UserError(f"{where}: column '{column.name}' is empty")
    found = numbers(known, where) if not gaps else _known(column, where)
    if found is None:
        refuse(where, 0, str(column.name), f"found '{column.iloc[0]}', not a number")
    return found


def _known(column: pd.Series, where: str) -> np.ndarray:
    """A column as float64 with NaN where it is empty. Raises UserError for text."""
    read = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64)
    if (row := first(np.isnan(read) & column.notna().to_numpy() | np.isinf(read))) is not None:
        refuse(where, row, str(column.name), f"found '{column.iloc[row]}', not a number")
    return read


def _beside(frame: pd.DataFrame, columns: tuple[str, ...], where: str) -> np.ndarray:
    """Columns `[N, C]` of what is measured besides; NaN all over where the file lacks one."""
    empty = np.full(len(frame), np.nan)
    found = [_known(frame[name], where) if name in frame.columns else empty for name in columns]
    return np.stack(found, 1) if found else np.zeros((len(frame), 0))


def _hours(column: pd.Series, sites: list[np.ndarray], config: SeriesConfig, where: str) -> np.ndarray:
    """Dates as hours since 1970, int64 `[N]`."""
    missing(column, where)
    if types.is_datetime64_any_dtype(column):
        dates = column.dt.tz_convert(None) if getattr(column.dt, "tz", None) is not None else column
    else:
        dates = _dates(column.astype(str).str.strip(), sites, config, where)
    seconds = dates.to_numpy().astype("datetime64[s]").astype(np.int64)
    if (row := first(seconds % HOUR != seconds[0] % HOUR)) is not None:
        refuse(
            where,
            row,
            str(column.name),
            f"found '{column.iloc[row]}', not a whole number of hours after the first date",
        )
    return seconds // HOUR


def _dates(text: pd.Series, sites: list[np.ndarray], config: SeriesConfig, where: str) -> pd.Series:
    """Dates in the format that is given, or in the only one that fits: every cell, and then the hours that it gives."""
    tried = [config.format] if config.format else list(FORMATS)
    look = pd.concat([text.head(LOOK), text.tail(LOOK)])  # most formats are out after a look
    tried = [form for form in tried if not pd.to_datetime(look, format=form, errors="coerce").isna().any()] or tried
    read = {form: pd.to_datetime(text, format=form, errors="coerce") for form in tried}
    whole = {form: dates for form, dates in read.items() if not dates.isna().any()}
    if not whole:
        best = max(read.values(), key=lambda dates: int(dates.notna().sum()))
        row = first(best.isna().to_numpy())
        assert row is not None
        known = re.sub(r"%(\w)", lambda m: {"Y": "YYYY", "m": "MM", "d": "DD", "H": "hh", "M": "mm", "S": "ss"}.get(m[1], m[0]),
                       config.format or FORMATS[0])  # fmt: skip
        remedy = "" if config.format else "; or say in series.format how dates are written"
        refuse(where, row, config.time, f"found '{text.iloc[row]}', not a date such as {known}{remedy}")
    if len(whole) > 1:  # day before month or after: only one of them gives rows an hour apart
        steps = {form: _orderly(dates, sites) for form, dates in whole.items()}
        best_share = max(steps.values())
        whole = {form: dates for form, dates in whole.items() if steps[form] == best_share}
    if len(whole) > 1 and len({tuple(d.astype("int64")) for d in whole.values()}) > 1:
        forms = " or ".join(f"'{form}'" for form in whole)
        raise UserError(
            f"series.format: column '{config.time}' of {where.removeprefix('path: ')} may be {forms}; say which"
        )
    return next(iter(whole.values()))


def _orderly(dates: pd.Series, sites: list[np.ndarray]) -> float:
    """Share of the rows that come one hour after the row of the same site before them."""
    hours = dates.to_numpy().astype("datetime64[s]").astype(np.int64) / HOUR
    steps = [np.diff(hours[own]) for own in sites]
    total = sum(map(len, steps))
    return sum(int((s == 1).sum()) for s in steps) / total if total else 0.0


def _check_order(hours: np.ndarray, own: np.ndarray, name: str, dates: pd.Series, where: str, whole: bool) -> None:
    """Refuse a site whose dates do not go up hour by hour."""
    column, step = str(dates.name), np.diff(hours[own])
    seen, again = np.unique(hours[own], return_index=True)
    if len(seen) < len(own):
        double = np.setdiff1d(np.arange(len(own)), again)[0]
        before = int(np.flatnonzero(hours[own] == hours[own[double]])[0])
        refuse(where, int(own[double]), column, f"found '{dates.iloc[own[double]]}' a second time for site '{name}'; "
               f"it stands in row {own[before] + 1}, too")  # fmt: skip
    if (place := first(step < 0)) is not None:
        late, row = own[place], int(own[place + 1])
        refuse(where, row, column, f"found '{dates.iloc[row]}' after '{dates.iloc[late]}' of the same site '{name}'; "
               "put the rows in the order of their dates")  # fmt: skip
    if whole and (place := first(step > 1)) is not None:
        row, lacking = int(own[place + 1]), int(step[place]) - 1
        refuse(where, row, column, f"{lacking} hour{'' if lacking == 1 else 's'} of site '{name}' missing before "
               f"'{dates.iloc[row]}'; fill them in, or set series.gaps: skip")  # fmt: skip
