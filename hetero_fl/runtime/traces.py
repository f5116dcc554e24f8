"""Files of traces: a CSV of devices, a row each. A mistake in one is a line that names the file, the row and the column."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from hetero_fl.config.devices import WIDEST
from hetero_fl.errors import UserError, nearest

TAKES = ("speed", "up", "down")  # what time follows from
NUMBERS = (*TAKES, "jitter", "failure")
COLUMNS = ("client", *NUMBERS, "online")
MEANT = {
    **dict.fromkeys(TAKES, "a number above 0, such as 1.0e+8"),
    "jitter": f"a number from 0 to {WIDEST:g}",
    "failure": "a chance from 0 to 1",
    "online": "stretches of seconds of the day, in order and apart, such as 0-21600;64800-86400",
}
Spans = tuple[tuple[float, float], ...]  # [from, to) in seconds of the day, in order and apart
Trace = dict[str, Any]


def read_traces(path: str) -> list[Trace]:
    """The rows of a CSV of devices. Raises UserError in one line that names the file and the row."""
    where = f"devices.file: {path}"
    try:
        with Path(path).expanduser().open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            names = [name.strip() for name in rows.fieldnames or ()]
            _check_columns(where, names)
            made = [_trace(f"{where}, row {number}", row) for number, row in enumerate(rows, 2)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{where}: {getattr(error, 'strerror', None) or error}") from None
    if not made:
        raise UserError(f"{where}: no rows")
    whose = Counter(row["client"] for row in made if "client" in row)
    if again := next((id for id, rows in whose.items() if rows > 1), None):
        raise UserError(f"{where}: two rows are of client '{again}'; give each client one")
    return made


def _check_columns(where: str, names: list[str]) -> None:
    for name in names:
        if name not in COLUMNS:
            if other := next((mark for mark in (";", "\t") if mark in name), None):
                mark = "a semicolon" if other == ";" else "a tabulator"
                raise UserError(f"{where}: found {mark} between the columns' names; separate them with commas")
            raise UserError(f"{where}: unknown column '{name}'{nearest(name, COLUMNS)}")
        if names.count(name) > 1:
            raise UserError(f"{where}: two columns are called '{name}'")


def _trace(where: str, row: Mapping[str | None, Any]) -> Trace:
    made: Trace = {}
    if None in row:
        raise UserError(
            f"{where}: more values than columns; commas stand between values alone, semicolons between stretches of `online`"
        )
    for name, text in row.items():
        assert name is not None
        if text is None:
            raise UserError(f"{where}: fewer values than columns; leave empty what is not known: 1.0e+8,,")
        name, text = name.strip(), text.strip()
        try:
            if text:
                made[name] = text if name == "client" else _spans(text) if name == "online" else _number(name, text)
        except ValueError:
            raise UserError(f"{where}, column {name}: found '{text}'; write {MEANT[name]}") from None
    return made


def _number(name: str, text: str) -> float:
    value = float(text)
    lowest, highest = 0.0, {"failure": 1.0, "jitter": WIDEST}.get(name, math.inf)
    if not lowest <= value <= highest or (value == 0 and name in TAKES):
        raise ValueError(text)
    return value


def _spans(text: str) -> Spans:
    spans = sorted((float(a), float(b)) for a, b in (part.split("-") for part in text.split(";")))
    apart = all(a[1] <= b[0] for a, b in pairwise(spans))
    if not apart or not all(0 <= start < end < math.inf for start, end in spans):
        raise ValueError(text)
    return tuple(spans)
