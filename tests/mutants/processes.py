"""Run tests of a copied tree in processes that have loaded the dependencies already."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.mutants.coverage_map import Test
from tests.mutants.source import PACKAGES

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["matplotlib.figure", "pandas", "pytest", "torchvision", "yaml"])
ENDED = 100
"""Added to the exit status of pytest, so that it is not that of a process that failed before."""
PASSED = (ENDED + pytest.ExitCode.OK, ENDED + pytest.ExitCode.USAGE_ERROR)
"""Statuses if no test fails. The second means that the tree has not all of the tests."""


class Started:
    """A plug-in of pytest that writes the name of each test to a file when the test starts."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Write the name of a test."""
        self._path.write_text(nodeid, encoding="utf-8")


def first_failure(tests: Sequence[Test], tree: Path) -> str | None:
    """Return the name of the first test that fails or does not end in time, or None.

    Args:
        tests: The tests.
        tree: Root of the tree.

    Raises:
        RuntimeError: If the process of the tests cannot start pytest.
    """
    started = tree / "started.txt"
    # A test whose module cannot be imported does not start.
    started.write_text(tests[0].name, encoding="utf-8")
    process = SERVER.Process(target=_run, args=([test.name for test in tests], tree, started))
    process.start()
    process.join(120 + 4 * sum(test.seconds for test in tests))
    if process.exitcode is None and process.pid is not None:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    elif process.exitcode is not None and 0 < process.exitcode < ENDED:
        raise RuntimeError(f"the process of the tests failed with status {process.exitcode}")
    elif process.exitcode in PASSED:
        return None
    return started.read_text(encoding="utf-8")


def _run(names: Sequence[str], tree: Path, started: Path) -> None:
    # The group of processes that is killed if the tests do not end.
    os.setpgid(0, 0)
    root = Path(__file__).parents[2]
    for name in [n for n in sys.modules if n.partition(".")[0] in (*PACKAGES, "tests")]:
        del sys.modules[name]
    sys.path[:] = [str(tree), *(path for path in sys.path if Path(path).resolve() != root)]
    os.environ |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    os.chdir(tree)
    silent = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(silent, stream)
    options = ["-p", "no:cacheprovider", "--exitfirst", *names]
    sys.exit(ENDED + pytest.main(options, plugins=[Started(started)]))
