"""Logger that writes a CSV file with one row per round."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import PrivateAttr
from typing_extensions import override

from hetero_fl.reporting.loggers.base import LoggedRun, Logger, register_logger, round_scalars
from hetero_fl.utils.serialization import write_atomically

FILE = "metrics.csv"


@register_logger("csv")
class CSVLogger(Logger):
    """Write `metrics.csv` in the run directory, with one row per round and one column per number.

    Cells of rounds without evaluation are empty. The file is written again if a later round has
    further columns, and on resume.
    """

    rewrites: ClassVar[bool] = True

    _path: Path = PrivateAttr()
    _columns: list[str] = PrivateAttr()
    _rows: list[Mapping[str, Any]] = PrivateAttr()

    @override
    def start(self, run: LoggedRun) -> None:
        self._path = run.path / FILE
        self._columns = []
        self._rows = []

    @override
    def log(self, record: Mapping[str, Any]) -> None:
        row = {"round": record["round"], **round_scalars(record)}
        columns = list(dict.fromkeys([*self._columns, *row]))
        if columns == self._columns:
            with open(self._path, "a", encoding="utf-8", newline="") as file:
                file.write(_to_csv([row], columns))
        else:
            header = {name: name for name in columns}
            write_atomically(self._path, _to_csv([header, *self._rows, row], columns).encode())
            self._columns = columns
        self._rows.append(row)


def _to_csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, columns, restval="", lineterminator="\n").writerows(rows)
    return text.getvalue()
