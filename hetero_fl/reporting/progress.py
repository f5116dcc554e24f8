"""Show the progress of runs and write logs.

Log lines are written to a file and to the logger `hetero_fl`. In a terminal, all output goes to
stderr, so that stdout stays free for results.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from datetime import datetime
from traceback import format_exception
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress as Bar,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from hetero_fl.reporting.formatting import (
    format_arrivals,
    format_bytes,
    format_duration,
    format_evaluation,
    format_final_evaluation,
)
from hetero_fl.reporting.notebook import ProgressBar, in_notebook
from hetero_fl.reporting.terminal import Terminal
from hetero_fl.utils.errors import RunFailedError, UserError, printable, printable_lines
from hetero_fl.utils.text import Caution, pluralize

logger = logging.getLogger("hetero_fl")


class Progress:
    """Show the progress of a run, as a context manager.

    One line is written for each evaluated round. A terminal and a notebook also show a progress
    bar. On exit, the terminal is restored, and an error is written to the log.

    Args:
        log_path: File to which log lines are appended. If None, no log file is written.
        quiet: Whether to hide the progress. The log is still written. If None, progress is shown in
            notebooks only.
        console: Console for the output. If None, the output is written to stderr.

    Attributes:
        unit: Unit of errors in a regression.
        is_terminal: Whether a progress bar is shown in a terminal.
    """

    def __init__(
        self,
        log_path: str | os.PathLike[str] | None = None,
        quiet: bool | None = False,
        console: Console | None = None,
    ) -> None:
        notebook = console is None and in_notebook() and not quiet
        self._notebook = ProgressBar() if notebook else None
        hide = notebook or quiet is not False
        self._console = console or Terminal(
            stderr=True, highlight=False, soft_wrap=True, quiet=hide
        )
        self._bar = Bar(
            TextColumn("round"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}", style="dim", markup=False),
            console=self._console,
            transient=True,
        )
        self._task = self._bar.add_task("", total=0)
        self._log_path = log_path
        self._log: TextIO | None = None
        self._no_output = logging.NullHandler()
        self._rounds = 0
        self._first = 0
        self._started = 0.0
        self.unit = ""
        self.is_terminal = self._console.is_terminal

    def __enter__(self) -> Progress:
        if not self._console.quiet:
            # The console shows warnings, which logging would print once more.
            logger.addHandler(self._no_output)
        if self._log_path is not None:
            # With line buffering, the log of a killed run is complete up to its last line.
            self._log = open(self._log_path, "a", encoding="utf-8", buffering=1)
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()
        logger.removeHandler(self._no_output)
        if self._log is not None:
            if isinstance(error, Exception):
                self._write_failure(error)
            self._log.close()
            self._log = None

    def start(self, rounds: int, clients: int, done: int = 0) -> None:
        """Start the display.

        Args:
            rounds: Number of rounds of the run.
            clients: Number of clients.
            done: Number of rounds that were completed before a resume.
        """
        self._rounds = rounds
        self._first = done
        self._started = time.monotonic()
        resumed = f", {done} of them already completed" if done else ""
        self.log(f"{pluralize(clients, 'client')}, {pluralize(rounds, 'round')}{resumed}")
        if self.is_terminal:
            self._bar.start()
        self._show("", done, rounds)

    def show_task(self, text: str) -> None:
        """Show the current task in a terminal, such as `hospital_2 trains resnet18`."""
        self._bar.update(self._task, description=text)

    def finish_round(self, record: Mapping[str, Any]) -> None:
        """Report a completed round.

        Args:
            record: Record of the round, as in `metrics.jsonl`.
        """
        completed = record["round"]
        # A simulation may have many failures, so only their number is logged.
        if "simulated" not in record:
            for client, reason in record["failed"].items():
                self.log(Caution(f"round {completed}: {client} dropped ({reason})"))
        if ("counts" in record or "diverged" in record) and (arrivals := format_arrivals(record)):
            self.log(f"round {completed}: {arrivals}")
        for client, reason in record.get("absent", {}).items():
            self.log(f"round {completed}: {client} not evaluated ({reason})")
        is_shown = self._notebook is not None or not self._console.quiet
        left = self._time_left(completed) if is_shown else ""
        scores = format_evaluation(record, self.unit) if "personal" in record else ""
        if scores:
            line = f"round {completed}/{self._rounds}  {scores}"
            self.write(line)
            self._print(line + left)
        self._show(f"{scores}{left}", completed, self._rounds)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Report the end of the run.

        Args:
            summary: Content of `summary.json`.
        """
        self._stop()
        scores = format_final_evaluation(summary, self.unit)
        rounds = pluralize(summary["rounds_completed"], "round")
        duration = format_duration(summary["seconds"]["total"])
        up = format_bytes(summary["communication"]["up_bytes"])
        down = format_bytes(summary["communication"]["down_bytes"])
        line = f"done: {rounds} in {duration}, {up} up and {down} down"
        line = f"{line}; {scores}" if scores else line
        self.log(line)
        if self._notebook is not None:
            self._notebook.finish(line)

    def finish_job(self, line: str, done: int, total: int) -> None:
        """Report a finished run of a comparison.

        Args:
            line: The result of the run.
            done: Number of finished runs.
            total: Number of all runs.
        """
        self.log(f"{done}/{total} {line}")
        self._show(line, done, total)

    def log(self, line: str) -> None:
        """Print one line and append the line to the log file.

        A `Caution` starts with "warning:" and has the level WARNING.
        """
        level = logging.INFO
        if isinstance(line, Caution):
            level = logging.WARNING
            line = f"warning: {line}"
        line = " ".join(line.split())
        self.write(line, level)
        self._print(line)

    def write(self, line: str, level: int = logging.INFO) -> None:
        """Append one line to the log file without printing it."""
        line = printable(line)
        logger.log(level, "%s", line)
        if self._log is not None:
            self._log.write(f"{datetime.now():%Y-%m-%d %H:%M:%S}  {line}\n")

    def _print(self, line: str) -> None:
        self._console.print(Text(line))

    def _show(self, text: str, done: int, total: int) -> None:
        """Update the progress bar in a terminal or a notebook."""
        self._bar.update(self._task, completed=done, total=total)
        if self._notebook is not None:
            self._notebook.update(text, done, total)

    def _time_left(self, completed: int) -> str:
        """Return the estimated time of the remaining rounds in parentheses."""
        completed_here = completed - self._first
        if completed_here < 1 or completed >= self._rounds:
            return ""
        seconds_per_round = (time.monotonic() - self._started) / completed_here
        return f"  ({format_duration(seconds_per_round * (self._rounds - completed))} left)"

    def _write_failure(self, error: Exception) -> None:
        """Log the error that ended the run, with the traceback of the cause."""
        self.write(f"failed: {' '.join(str(error).split())}")
        cause = error.__cause__ if isinstance(error, UserError | RunFailedError) else error
        if cause is not None and self._log is not None:
            self._log.writelines(map(printable_lines, format_exception(cause)))

    def _stop(self) -> None:
        if self._bar.live.is_started:
            self._bar.stop()
