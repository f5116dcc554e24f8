"""The tests that execute each line, from a run of the tests with coverage contexts."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from coverage import CoverageData

DATA = "coverage"
DURATIONS = "durations.jsonl"


@dataclass(frozen=True)
class Test:
    """A test.

    Attributes:
        name: Node id of pytest.
        seconds: Duration.
        slow: Whether the test is marked `slow`.
    """

    name: str
    seconds: float
    slow: bool


class CoverageMap:
    """The tests that execute each line of a source tree.

    Tests that run commands or worker processes execute lines in these processes, too. The lines of
    a fixture belong to the first test that uses it.

    Args:
        folder: A folder that `measure` has written.
        root: Root of the source tree that was measured.
    """

    def __init__(self, folder: Path, root: Path) -> None:
        self._root = root
        self._data = CoverageData(str(folder / DATA))
        self._data.read()
        self._folder = folder
        with (folder / DURATIONS).open(encoding="utf-8") as file:
            self.tests = {entry[0]: Test(*entry) for entry in map(json.loads, file)}

    @cached_property
    def _breadth(self) -> Counter[str]:
        """Number of files that each test executes."""
        query = (
            "select context, count(distinct file_id) from line_bits "
            "join context on context.id = context_id group by context"
        )
        breadth: Counter[str] = Counter()
        with sqlite3.connect(self._folder / DATA) as data:
            for context, files in data.execute(query):
                breadth[_test_of(context)] += files
        return breadth

    def tests_of(self, path: Path, lines: Iterable[int]) -> list[Test]:
        """Return the tests that execute one of the lines, those that execute few files first.

        Args:
            path: The file, relative to the root.
            lines: Numbers of the lines.
        """
        by_line = self._data.contexts_by_lineno(str(self._root / path))
        names = {_test_of(context) for line in lines for context in by_line.get(line, ())}
        found = [self.tests[name] for name in names if name in self.tests]
        return sorted(found, key=lambda t: (self._breadth[t.name], t.seconds, t.name))


def measure(folder: Path, root: Path, *options: str) -> None:
    """Run all tests with coverage, and write the data and the durations into a folder.

    Args:
        folder: The folder.
        root: Root of the source tree.
        *options: Further options of pytest.
    """
    folder.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "COVERAGE_FILE": str(folder / DATA),
        "TEST_DURATIONS": str(folder / DURATIONS),
    }
    command = [sys.executable, "-m", "pytest", "--cov", "--cov-context=test", "--cov-report="]
    command += ["-p", "tests.mutants.durations", "--dist", "loadfile", *options]
    subprocess.run(command, cwd=root, env=environment, check=False)


def _test_of(context: str) -> str:
    """Return the test of a context, such as `tests/a.py::test_b|run` or `… (call)`.

    The second form is that of the variable `PYTEST_CURRENT_TEST` in child processes.
    """
    return context.rpartition("|")[0] or context.rpartition(" (")[0]
