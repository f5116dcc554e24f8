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

    @override
    def start(self, run: LoggedRun) -> None:
        self._path = run.path / FILE
        self._columns = []
        self._path.unlink(missing_ok=True)

    @override
    def log(self, record: Mapping[str, Any]) -> None:
        row = {"round": record["round"], **round_scalars(record)}
        new_columns = [name for name in row if name not in self._columns]
        if not new_columns:
            with open(self._path, "a", encoding="utf-8", newline="") as file:
                file.write(_to_csv([row], self._columns))
            return
        rows: list[Mapping[str, Any]] = []
        if self._columns:
            with open(self._path, encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file))
        self._columns += new_columns
        text = _to_csv([dict(zip(self._columns, self._columns, strict=True))], self._columns)
        write_atomically(self._path, (text + _to_csv([*rows, row], self._columns)).encode())


def _to_csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, restval="", lineterminator="\n")
    writer.writerows(rows)
    return buffer.getvalue()
