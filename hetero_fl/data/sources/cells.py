"""Cells of tables as numbers and names: decimal commas, labels written in several ways, values that are missing."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import NoReturn

import numpy as np
import pandas as pd
from pandas.api import types

from hetero_fl.errors import UserError
from hetero_fl.state import in_order

COUNTED = re.compile(r"([+-]?\d+)(?:\.0*)?")  # 1, 01 and 1.0
WHOLE = re.compile(r"\s*[+-]?\d+\s*")
COMMA = re.compile(r"\s*[+-]?\d+,\d+(?:[eE][+-]?\d+)?\s*")
THOUSANDS = re.compile(r"\s*[+-]?[1-9]\d{0,2},\d{3}\s*")
SEPARATED = re.compile(r"\s*[+-]?\d{1,3}(?:[.,'’]\d{3})+(?:[.,]\d+)?\s*")
MANY_CATEGORIES = 20  # a text column with so many different values is not encoded unless asked for
CATEGORICAL = "; if the column holds categories, list them in data.categories"
REMEDY = "write numbers as 1234.5"


def decimal_commas(frame: pd.DataFrame, where: str, besides: Collection[str] = ()) -> tuple[pd.DataFrame, list[str]]:
    """The frame with columns such as "0,5" as numbers, and the names of those columns; `besides` are left as they are.

    "1,250" may be a decimal comma or a thousand: it is the former if another cell of the table can be nothing else.

    Raises:
        UserError: no cell decides; another column of the table has decimal points that may be thousands then.
    """
    columns = {
        name: frame[name].dropna().astype(str)
        for name in frame.columns
        if str(name) not in besides and is_text(frame[name])
    }
    commas = {
        name: texts
        for name, texts in columns.items()
        if (decimal := texts.str.fullmatch(COMMA)).any() and (decimal | texts.str.fullmatch(WHOLE)).all()
    }
    if not commas:
        return frame, []
    if all(texts[texts.str.contains(",")].str.fullmatch(THOUSANDS).all() for texts in commas.values()):
        name, texts = next(iter(commas.items()))
        row = int(frame[name].astype(str).str.contains(",").to_numpy().argmax())
        refuse(where, row, str(name), f"found '{texts.loc[frame.index[row]]}', decimal comma or thousands? {REMEDY}")
    for name in frame.columns:
        if types.is_float_dtype(frame[name]):
            values = frame[name].dropna().to_numpy(dtype=np.float64)
            values = values[np.isfinite(values) & (values != np.floor(values))]
            if (
                len(values)
                and (np.abs(values) >= 1).all()
                and np.allclose(values * 1000, np.round(values * 1000), 0, 1e-6)
            ):
                raise UserError(
                    f"{where}: column '{name}' has decimal points and column '{next(iter(commas))}' decimal commas: "
                    f"are the points thousands? {REMEDY}"
                )
    frame = frame.copy(deep=False)
    for name in commas:
        frame[name] = frame[name].str.replace(",", ".").astype(np.float64)
    return frame, list(map(str, commas))


def numbers(column: pd.Series, where: str, gaps: list[str] | None = None, hint: str = "") -> np.ndarray | None:
    """A column as numbers, float64 `[N]`, or None if it is all text or dates. Raises UserError naming the row, but for
    missing values where `gaps` is given: they are NaN, and a line on the first is added to it. `hint` ends the error."""
    name = str(column.name)
    if not (types.is_numeric_dtype(column) or types.is_bool_dtype(column)):
        if not is_text(column):
            return None
        read = pd.to_numeric(column, errors="coerce")
        text = read.isna() & column.notna()
        if text.any() and read.isna().all():
            written = column.dropna().astype(str)
            if not written.str.fullmatch(SEPARATED).all():
                return None
        if (row := first(text)) is not None:
            remedy = f"; {REMEDY}" if re.search(r"\d[.,'’]\d", str(column.iloc[row])) else hint
            refuse(where, row, name, f"found '{column.iloc[row]}', not a number{remedy}")
        column = read
    gap = gap_in(column, where)
    if gap is not None:
        if gaps is None:
            raise UserError(f"{gap}; fill or drop them")
        gaps.append(gap)
    values = column.to_numpy(dtype=np.float64, na_value=np.nan)
    beyond = ~np.isfinite(values) | (np.abs(values) > np.finfo(np.float32).max)
    if (row := first(beyond & ~column.isna().to_numpy())) is not None:
        refuse(where, row, name, f"found {values[row]}, not a finite number")
    return values


def names(column: pd.Series, where: str) -> pd.Series:
    """A column of labels, sites or patients as text that does not depend on how a file writes them: without spaces around
    it, and 1 for 1.0, but 01 is not 1 where the column is of text. Raises UserError where a value is missing."""
    column = stripped(column, where)
    if types.is_float_dtype(column):
        whole = column == np.floor(column)
        return column.astype(str).where(~whole, column.where(whole, 0).astype(np.int64).astype(str))
    text = column.astype(str)
    return text.str.replace(COUNTED, r"\1", regex=True) if text.str.fullmatch(COUNTED).all() else text


def written(column: pd.Series) -> pd.Series:
    """Return the column as text without spaces around it, whole floats as integers; NaN where a value is missing."""
    present = column[column.notna()]
    text = names(present, "") if types.is_float_dtype(present) else present.astype(str).str.strip()
    return text[text != ""].astype(object).reindex(column.index)


def categories_in(frame: pd.DataFrame, where: str) -> dict[str, tuple[str, ...]]:
    """Return the text columns with fewer than `MANY_CATEGORIES` different values, and their values in order."""
    found = {}
    for name in frame.columns:
        if is_categorical(frame[name]) and numbers(frame[name], where, [], CATEGORICAL) is None:
            values = written(frame[name]).dropna().unique().tolist()
            if 0 < len(values) < MANY_CATEGORIES:
                found[str(name)] = tuple(in_order(values))
    return found


def indicated(column: pd.Series, values: Sequence[str], notes: list[str] | None = None) -> np.ndarray:
    """Return 1 where a column has a value, else 0, as float64 `[N, len(values)]`.

    A row whose value is missing or is none of these has 0 everywhere; a line on such rows is added to `notes`.
    """
    text = written(column)
    plain = text.map(lambda cell: COUNTED.sub(r"\1", cell) if COUNTED.fullmatch(cell) else cell, na_action="ignore")
    found = np.stack([(text == value).to_numpy(bool) | (plain == value).to_numpy(bool) for value in values], axis=1)
    unknown = text.notna().to_numpy() & ~found.any(axis=1)
    empty = text.isna().to_numpy()
    if notes is not None and (row := first(unknown)) is not None:
        what = f"{int(unknown.sum())} of {len(text)} rows have none of {', '.join(values)} (row {row + 1}: '{text.iloc[row]}')"
        notes.append(f"column '{column.name}': {what}; their indicators are 0")
    if notes is not None and (row := first(empty)) is not None:
        what = f"{int(empty.sum())} of {len(text)} cells are empty (row {row + 1})"
        notes.append(f"column '{column.name}': {what}; their indicators are 0")
    return found.astype(np.float64)


def settled(column: pd.Series, where: str) -> pd.Series:
    """The column without spaces around text, and in numbers where every text is one. Raises UserError: missing value."""
    column = stripped(column, where)
    if is_text(column):
        read = pd.to_numeric(column.astype(str), errors="coerce")
        return column if not np.isfinite(read).all() else read
    return column


def stripped(column: pd.Series, where: str) -> pd.Series:
    """The column without spaces around text. Raises UserError: missing value."""
    if is_text(column) or isinstance(column.dtype, pd.CategoricalDtype):
        text = column.astype(object).map(lambda value: value.strip() if isinstance(value, str) else value)
        column = text.mask(text == "")
    missing(column, where)
    return column


def missing(column: pd.Series, where: str) -> None:
    """Raises UserError for a missing value."""
    if (gap := gap_in(column, where)) is not None:
        raise UserError(f"{gap}; fill or drop them")


def gap_in(column: pd.Series, where: str) -> str | None:
    """A line on the first missing value, if there is any."""
    gaps = column.isna()
    row = first(gaps)
    if row is None:
        return None
    return f"{where}: row {row + 1}, column '{column.name}': missing value ({int(gaps.sum())} in {len(gaps)} rows)"


def is_text(column: pd.Series) -> bool:
    """Whether a column is of texts, or of all kinds of things."""
    return not types.is_numeric_dtype(column) and (types.is_object_dtype(column) or types.is_string_dtype(column))


def is_categorical(column: pd.Series) -> bool:
    """Return whether a column may hold categories: it is of text, or of pandas' categorical type."""
    return is_text(column) or isinstance(column.dtype, pd.CategoricalDtype)


def first(bad: pd.Series | np.ndarray) -> int | None:
    """Place of the first True."""
    mask = np.asarray(bad, dtype=bool)
    return int(mask.argmax()) if mask.any() else None


def refuse(where: str, row: int, column: str, what: str) -> NoReturn:
    """Raise the error of a cell; `row` counts from 0, messages count from 1 below the header."""
    raise UserError(f"{where}: row {row + 1}, column '{column}': {what}")
