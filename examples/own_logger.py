"""A logger of your own: one line of Markdown per evaluated round.

Run this example from the root of a checkout:

    python examples/own_logger.py
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, PrivateAttr

import hetero_fl
from hetero_fl.reporting.loggers import LoggedRun, round_scalars


@hetero_fl.register_logger("markdown")
class MarkdownLogger(hetero_fl.Logger):
    """Write a line of Markdown for each evaluated round."""

    file: str = Field("rounds.md", description="name of the file in the run directory")
    number: str = Field("test/global/accuracy", description="name of the number to write")

    _path: Path = PrivateAttr()

    def start(self, run: LoggedRun) -> None:
        """Start a new file, or keep the lines of the rounds before an interruption."""
        self._path = run.path / self.file
        if run.first_round == 1:
            self._path.write_text(f"# {run.name}\n\n", encoding="utf-8")

    def log(self, record: Mapping[str, Any]) -> None:
        """Append a line unless the round was not evaluated."""
        value = round_scalars(record).get(self.number)
        if value is not None:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(f"- round {record['round']}: {self.number} = {value:.3f}\n")


if __name__ == "__main__":
    run = hetero_fl.run(
        "configs/digits_quickstart.yaml",
        overrides=["rounds=3", "output.loggers=[markdown]"],
        quiet=False,
    )
    print((run.path / "rounds.md").read_text(encoding="utf-8"))
