"""The logger `json_lines`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, PrivateAttr

from hetero_fl import Logger
from hetero_fl.reporting.loggers import LoggedRun, round_scalars


class JSONLinesLogger(Logger):
    """Write the numbers of each round as a line of JSON.

    Args:
        file: Name of the file in the run directory.
    """

    file: str = Field("scalars.jsonl", description="name of the file in the run directory")

    _path: Path = PrivateAttr()

    def start(self, run: LoggedRun) -> None:
        """Start a new file, or keep the lines of the rounds before an interruption."""
        self._path = run.path / self.file
        if run.first_round == 1:
            self._path.write_text("", encoding="utf-8")

    def log(self, record: Mapping[str, Any]) -> None:
        """Append a line."""
        line = json.dumps({"round": record["round"], **round_scalars(record)})
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
