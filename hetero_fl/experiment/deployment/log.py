"""Lines of what happens at a server or a node: for a reader, or as JSON for whoever gathers them from many machines."""

from __future__ import annotations

import io
import json
import logging
import sys
import threading
from datetime import datetime, timezone
from typing import Any, TextIO

from hetero_fl.errors import one_line

LONGEST = 2000  # characters of a message


class Log:
    """Writes a line for everything that happens.

    Args:
        form: `text`, or `json`: an object a line with `time` (UTC), `message`, and what it is about: `run`, `round`, `client` …
        about: what all lines are about.
    """

    def __init__(self, form: str = "text", stream: TextIO | None = None, **about: Any) -> None:
        self.form, self.about = form, {name: value for name, value in about.items() if value is not None}
        self._stream, self._writing = stream, threading.Lock()
        self.quiet = False  # then nothing is written

    def __call__(self, line: str, **about: Any) -> None:
        """One thing that happened."""
        line = one_line(line, LONGEST)
        if self.form == "json":
            now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
            known = {name: value for name, value in {**self.about, **about}.items() if value is not None}
            line = json.dumps({"time": now, "message": line, **known}, ensure_ascii=False)
        else:
            line = f"{datetime.now():%Y-%m-%d %H:%M:%S}  {line}"
        if self.quiet:
            return
        with self._writing:
            print(line, file=self._stream or sys.stderr, flush=True)


class Lines(io.TextIOBase):
    """A stream whose lines go to a log: for what is printed elsewhere."""

    def __init__(self, log: Log) -> None:
        self._log, self._begun = log, ""

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            if line.strip():
                self._log(line)
        return len(text)


class Told(logging.Handler):
    """Passes on what the transport logs; the same line twice in a row is one."""

    def __init__(self, log: Log) -> None:
        super().__init__(logging.INFO)
        self._log, self._last = log, ""

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        if line != self._last:
            self._last = line
            self._log(line)
