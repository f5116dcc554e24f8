"""Show progress in the terminal and write TensorBoard events."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import (
    Progress as Bar,
)
from rich.text import Text

from hetero_fl.reporting.formatting import (
    capitalize_first,
    format_arrivals,
    format_bytes,
    format_duration,
    format_evaluation,
    format_final_evaluation,
)
from hetero_fl.utils.errors import RunFailedError, UserError
from hetero_fl.utils.text import pluralize

# What a run shows while it runs: a live display in a terminal, one quiet line an evaluated round
# elsewhere.
#
# Everything goes to stderr, so that stdout stays free for results; the lines go to the log file
# too.


class Progress:
    """Shows how far a run is. Use it as a context manager: leaving it puts the terminal in order, whatever happened.

    Without a log path nothing is written to disk. `quiet`: nothing is shown, the log is written all the same.
    """

    def __init__(
        self,
        log_path: str | os.PathLike[str] | None = None,
        quiet: bool = False,
        console: Console | None = None,
    ) -> None:
        self._console = console or Console(
            stderr=True, highlight=False, soft_wrap=True, quiet=quiet
        )
        self._log_path = log_path
        self._log: TextIO | None = None
        self._live: Live | None = None
        self._bar = Bar(
            TextColumn("round"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}", style="dim"),
            console=self._console,
        )
        self._task = Text("", style="dim")
        self._scores = Text("")
        self._rounds = self._done = self._first = 0
        self._began = 0.0
        self.unit = ""  # of errors

    def __enter__(self) -> Progress:
        if self._log_path is not None:
            # Line by line, so that the log of a killed run is whole up to its last line.
            self._log = open(self._log_path, "a", encoding="utf-8", buffering=1)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()
        if self._log is not None:
            if isinstance(error, Exception):
                self._write_failure(error)
            self._log.close()
            self._log = None

    @property
    def is_terminal(self) -> bool:
        """Whether a live display is shown."""
        return self._console.is_terminal

    def start(self, rounds: int, clients: int, done: int = 0) -> None:
        """The run begins, or goes on after `done` completed rounds."""
        self._rounds = rounds
        self._first = done
        self._done = done
        self._began = time.monotonic()
        resumed = f", {done} of them done before" if done else ""
        self.log(f"{pluralize(clients, 'client')}, {pluralize(rounds, 'round')}{resumed}")
        if self.is_terminal:
            self._bar_task = self._bar.add_task("round", total=rounds, completed=done, left="")
            self._live = Live(
                Group(self._bar, self._task, self._scores),
                console=self._console,
                refresh_per_second=4,
                transient=True,
            )
            self._live.start()

    def show_task(self, text: str) -> None:
        """What is being done now, such as `hospital_2 trains resnet18`; shown in a terminal only."""
        self._task.plain = text

    def finish_round(self, record: Mapping[str, Any]) -> None:
        """A round is complete: the record of `metrics.jsonl`."""
        self._done = record["round"]
        if "simulated" not in record:  # else there may be many, and they are counted
            for client, reason in record["failed"].items():
                self.log(f"round {self._done}: {client} left out ({reason})")
        if ("counts" in record or "diverged" in record) and (arrivals := format_arrivals(record)):
            self.log(f"round {self._done}: {arrivals}")
        for client, reason in record.get("unread", {}).items():
            self.log(f"round {self._done}: {client} not read ({reason})")
        if self._live is not None:
            self._bar.update(self._bar_task, completed=self._done, left=self._time_left())
        if "personal" in record:
            self._show_evaluation(record)

    def _show_evaluation(self, record: Mapping[str, Any]) -> None:
        figures = format_evaluation(record, self.unit)
        if not figures:
            return
        line = f"round {self._done}/{self._rounds}  {figures}"
        self._write(line)
        if self._live is None:
            left = self._time_left()
            self._print(line + (f"  ({left})" if left else ""))
        self._scores.plain = capitalize_first(figures)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """The run is over: its summary."""
        self._stop()
        figures = format_final_evaluation(summary, self.unit)
        exchanged = summary["communication"]
        self.log(
            f"done: {pluralize(summary['rounds_completed'], 'round')} in {format_duration(summary['seconds']['total'])}, "
            f"{format_bytes(exchanged['up_bytes'])} up and {format_bytes(exchanged['down_bytes'])} down"
            + (f"; {figures}" if figures else "")
        )

    def log(self, line: str) -> None:
        """One line for the reader and for the log file."""
        line = " ".join(line.split())
        self._write(line)
        self._print(line)

    def _time_left(self) -> str:
        fresh = self._done - self._first
        if fresh < 1 or self._done >= self._rounds:
            return ""
        return f"{format_duration((time.monotonic() - self._began) / fresh * (self._rounds - self._done))} left"

    def _print(self, line: str) -> None:
        self._console.print(Text(line))

    def _write(self, line: str) -> None:
        if self._log is not None:
            self._log.write(f"{datetime.now():%Y-%m-%d %H:%M:%S}  {line}\n")

    def _write_failure(self, error: Exception) -> None:
        """What ended the run; with the traceback of what lies behind the one line that the user sees."""
        self._write(f"failed: {' '.join(str(error).split())}")
        behind = error.__cause__ if isinstance(error, UserError | RunFailedError) else error
        if behind is not None and self._log is not None:
            self._log.writelines(traceback.format_exception(behind))

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


# The same figures as `metrics.jsonl`, for TensorBoard (the extra `hetero_fl[tensorboard]`).


def writer_callback(run_dir: str | os.PathLike[str]) -> Callable[[Mapping[str, Any]], None]:
    """A callback that writes each round's record below the run's `tensorboard/`.

    Raises UserError if TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "output.tensorboard: TensorBoard is not installed; pip install 'hetero_fl[tensorboard]', or set it to false"
        ) from None
    return partial(log_record, SummaryWriter(str(Path(run_dir) / "tensorboard")))


def log_record(writer: Any, record: Mapping[str, Any]) -> None:
    """Write one round's record: every defined metric, the mean training loss, bytes and seconds."""
    step = record["round"]
    for reading in ("personal", "global", "server"):
        for scores, prefix in ((record, "test"), (record.get("validation") or {}, "validation")):
            for name, value in (scores.get(reading) or {}).items():
                if value is not None:
                    writer.add_scalar(f"{prefix}/{reading}/{name}", value, step)
    losses = list(record["train_loss"].values())
    if losses:
        writer.add_scalar("train/loss", sum(losses) / len(losses), step)
    for direction in ("up_bytes", "down_bytes"):
        writer.add_scalar(f"communication/{direction}", record[direction], step)
    for part, seconds in record["seconds"].items():
        writer.add_scalar(f"seconds/{part}", seconds, step)
    writer.flush()
