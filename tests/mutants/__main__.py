"""Apply each mutant of `mutants.yaml` to a copy of the tree and run the tests that must fail.

    python -m tests.mutants [--only PATTERN] [--jobs N] [--slow]

The tests must pass without a mutant; this is checked first. A mutant survives if its tests pass.
A mutant that no longer applies, because its function or text is missing, counts as a survivor. The
exit status is 0 if all mutants were killed.
"""

from __future__ import annotations

import argparse
import compileall
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from queue import SimpleQueue

import yaml

from tests.mutants.source import MutantError, find_functions, mutate

ROOT = Path(__file__).resolve().parents[2]
TIME_LIMIT = 900  # seconds; a mutant that makes its tests hang is killed
LIST = Path(__file__).with_name("mutants.yaml")
COPIED = ("hetero_fl", "model_zoo", "tests", "configs", "scripts", "examples", "benchmarks", "docs")
FILES = ("pyproject.toml", "README.md", "CHANGELOG.md", "Makefile")


@dataclass(frozen=True)
class Mutant:
    """One small bug, and the tests that find it."""

    function: str
    replace: str
    by: str
    tests: str
    """Test files or node ids, separated by spaces."""

    slow: bool = False
    """The bug is found by tests marked `slow`."""


def main() -> int:
    """Run the mutants, print one line each and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", default="*", metavar="PATTERN", help="functions that match")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants at a time")
    parser.add_argument("--slow", action="store_true", help="also those that slow tests find")
    options = parser.parse_args()

    mutants = [m for m in load() if fnmatch(m.function, options.only)]
    mutants = [m for m in mutants if options.slow or not m.slow]
    if not mutants:
        parser.error(f"--only: no mutant of a function that matches {options.only!r}")
    with tempfile.TemporaryDirectory() as folder:
        copies = [_copy_tree(Path(folder) / str(number)) for number in range(options.jobs)]
        tests = sorted({test for mutant in mutants for test in mutant.tests.split()})
        if _run_tests(tests, copies[0], options.slow, "--numprocesses", str(options.jobs)) != 0:
            print("the tests of the mutants fail without a mutant; run `make test` first")
            return 1
        trees: SimpleQueue[Path] = SimpleQueue()
        for copy in copies:
            trees.put(copy)

        def judge(mutant: Mutant) -> str:
            tree = trees.get()
            try:
                return _judge(mutant, tree)
            finally:
                trees.put(tree)

        failures = 0
        with ThreadPoolExecutor(options.jobs) as pool:
            for mutant, verdict in zip(mutants, pool.map(judge, mutants), strict=True):
                failures += not verdict.startswith("killed")
                change = f"{mutant.replace} -> {mutant.by}"
                print(f"{verdict:16} {mutant.function}: {change}", flush=True)
    print(f"{len(mutants)} mutants, {failures} not killed")
    return 1 if failures else 0


def load() -> list[Mutant]:
    """Return the mutants of the list."""
    return [Mutant(**entry) for entry in yaml.safe_load(LIST.read_text(encoding="utf-8"))]


def _copy_tree(target: Path) -> Path:
    skipped = shutil.ignore_patterns("__pycache__", "runs")
    for name in COPIED:
        shutil.copytree(ROOT / name, target / name, ignore=skipped)
    for name in FILES:
        shutil.copy(ROOT / name, target / name)
    # Processes that write no bytecode would compile the packages for each mutant again.
    for package in ("hetero_fl", "model_zoo"):
        compileall.compile_dir(target / package, quiet=1)
    return target


def _judge(mutant: Mutant, tree: Path) -> str:
    try:
        path, text = mutate(find_functions(tree), mutant.function, mutant.replace, mutant.by)
    except MutantError as error:
        return f"does not apply ({error})"
    original = path.read_text(encoding="utf-8")
    started = time.monotonic()
    path.write_text(text, encoding="utf-8")
    try:
        code = _run_tests(mutant.tests.split(), tree, mutant.slow, "--exitfirst")
    finally:
        path.write_text(original, encoding="utf-8")
    seconds = f"({time.monotonic() - started:.0f} s)"
    if code == 1:
        return f"killed {seconds}"
    return f"survived {seconds}" if code == 0 else f"broken run, exit {code}"


def _run_tests(tests: Sequence[str], tree: Path, slow: bool, *options: str) -> int:
    """Run the tests in the tree; return pytest's exit status, or 1 if they do not end."""
    marks = [] if slow else ["-m", "not slow"]
    command = [
        sys.executable,
        "-B",
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        *options,
        *marks,
        *tests,
    ]
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        return subprocess.run(
            command,
            cwd=tree,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
            timeout=TIME_LIMIT,
        ).returncode
    except subprocess.TimeoutExpired:
        return 1


if __name__ == "__main__":
    sys.exit(main())
