"""A plug-in of pytest that records how long each test takes: `-p tests.mutants.durations`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest


class Durations:
    """Writes one line for each test: its id, its seconds and whether it is marked `slow`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seconds: dict[str, float] = {}
        self._slow: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add the duration of a phase of a test."""
        self._seconds[report.nodeid] = self._seconds.get(report.nodeid, 0) + report.duration
        if "slow" in report.keywords:
            self._slow.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        """Write the file."""
        with self._path.open("w", encoding="utf-8") as file:
            for test, seconds in self._seconds.items():
                file.write(json.dumps([test, round(seconds, 3), test in self._slow]) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    """Record in the process that receives the reports of all workers."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Durations(Path(os.environ["TEST_DURATIONS"])))
