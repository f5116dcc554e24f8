"""Put small bugs into a copy of the tree, and run the tests that execute the changed lines.

    python -m tests.mutants [--only PATTERN] [--jobs N]
    python -m tests.mutants --draw 400 --seed 0 --record

The bugs are those of `mutants.yaml` and the drawn ones of `record.csv`, which says which class of
tests killed each (quick tests, slow tests or none), and which test first. A mutant is lost if it
still applies and its class of tests does not kill it any more. Mutants of the list that are not in
the record must be killed. The exit status is 0 if none is lost.

The recorded test is run first. If it passes, the tests that execute the changed lines are run. The
first call that needs them runs all tests with coverage. Repeat it with `--measure` when the tests
have changed.
"""

from __future__ import annotations

import argparse
import compileall
import csv
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from functools import cached_property
from itertools import accumulate, takewhile
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Literal, NamedTuple

import yaml

from tests.mutants.coverage_map import CoverageMap, Test, measure
from tests.mutants.draw import draw_mutants
from tests.mutants.processes import first_failure
from tests.mutants.source import Function, Mutant, MutantError, find_functions, mutate

Verdict = Literal["quick", "slow", "none"]
"""The class of tests that kills a mutant."""
CLASSES: tuple[tuple[Verdict, bool], ...] = (("quick", False), ("slow", True))
"""Classes of tests, and whether their tests are marked `slow`."""
UNKNOWN: dict[bool, Verdict] = {True: "quick", False: "none"}
"""Expected verdict of a mutant that is not in the record, by whether it is in the list."""


class Judgement(NamedTuple):
    """Whether tests kill a mutant, and the first test that does."""

    verdict: Verdict
    test: str = ""


ROOT = Path(__file__).resolve().parents[2]
LIST = Path(__file__).with_name("mutants.yaml")
RECORD = Path(__file__).with_name("record.csv")
COVERAGE = ROOT / "build" / "mutants"
COPIED = ("hetero_fl", "model_zoo", "tests", "configs", "scripts", "examples", "benchmarks", "docs")
FILES = ("pyproject.toml", "README.md", "CHANGELOG.md", "Makefile")
SECONDS = 60.0
"""Seconds of tests of a class that are run for a mutant, those that execute few files first."""


def main() -> int:
    """Judge the mutants, print one line each and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", default="*", metavar="PATTERN", help="functions that match")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants at a time")
    parser.add_argument("--draw", type=int, metavar="N", help="draw new mutants")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw")
    parser.add_argument("--measure", action="store_true", help="measure coverage again")
    parser.add_argument("--record", action="store_true", help="write the verdicts to record.csv")
    options = parser.parse_args()

    record = read_record()
    drawn = list(record) if options.draw is None else draw_mutants(ROOT, options.draw, options.seed)
    listed = load()
    mutants = [m for m in dict.fromkeys([*listed, *drawn]) if fnmatch(m.function, options.only)]
    if options.measure:
        measure(COVERAGE, ROOT, "--numprocesses", str(options.jobs))
    judge = Judge(record, options.jobs)
    counts: Counter[tuple[str, str]] = Counter()
    for mutant, judgement in judge.judge_all(mutants):
        before = record[mutant].verdict if mutant in record else UNKNOWN[mutant in listed]
        verdict = judgement and judgement.verdict
        if options.record and judgement is not None:
            record[mutant] = judgement
            write_record(record)
        counts[before, verdict or "does not apply"] += 1
        lost = is_lost(before, verdict)
        mark = "LOST" if lost else ""
        print(f"{mark:5}{before} -> {verdict}: {mutant.function}: {mutant.replace}", flush=True)
    for (before, after), count in sorted(counts.items()):
        print(f"{count:5} {before} -> {after}")
    return int(any(is_lost(before, after) for before, after in counts))


def is_lost(before: str, after: str | None) -> bool:
    """Return whether a mutant that was killed is not killed by tests of its class any more."""
    ranks = ("none", "slow", "quick")
    return after in ranks and ranks.index(after) < ranks.index(before)


def load() -> list[Mutant]:
    """Return the mutants of the list."""
    return [Mutant(**entry) for entry in yaml.safe_load(LIST.read_text(encoding="utf-8"))]


def read_record() -> dict[Mutant, Judgement]:
    """Return the recorded judgements."""
    if not RECORD.exists():
        return {}
    with RECORD.open(encoding="utf-8", newline="") as file:
        return {
            Mutant(*row[:3]): Judgement(row[3], row[4])  # type: ignore[arg-type]
            for row in csv.reader(file)
        }


def write_record(record: dict[Mutant, Judgement]) -> None:
    """Write the judgements."""
    with RECORD.open("w", encoding="utf-8", newline="") as file:
        rows = [[m.function, m.replace, m.by, *judgement] for m, judgement in record.items()]
        csv.writer(file, lineterminator="\n").writerows(rows)


class Judge:
    """Finds out which tests kill a mutant.

    Args:
        record: Earlier judgements, whose tests are run first.
        jobs: Number of mutants that are judged at a time.
    """

    def __init__(self, record: dict[Mutant, Judgement], jobs: int) -> None:
        self._record = dict(record)
        self._jobs = jobs
        self._lock = Lock()

    @cached_property
    def _coverage(self) -> CoverageMap:
        if not COVERAGE.exists():
            measure(COVERAGE, ROOT, "--numprocesses", str(self._jobs))
        return CoverageMap(COVERAGE, ROOT)

    def judge_all(self, mutants: Sequence[Mutant]) -> Iterator[tuple[Mutant, Judgement | None]]:
        """Yield each mutant with its judgement, or None if it does not apply.

        Args:
            mutants: The mutants.
        """
        functions = find_functions(ROOT)
        with tempfile.TemporaryDirectory() as folder:
            trees: SimpleQueue[Path] = SimpleQueue()
            for number in range(self._jobs):
                trees.put(_copy_tree(Path(folder) / str(number)))

            def judge(mutant: Mutant) -> Judgement | None:
                tree = trees.get()
                try:
                    return self._judge(mutant, functions, tree)
                finally:
                    trees.put(tree)

            with ThreadPoolExecutor(self._jobs) as pool:
                yield from zip(mutants, pool.map(judge, mutants), strict=True)

    def _judge(self, mutant: Mutant, functions: list[Function], tree: Path) -> Judgement | None:
        try:
            change = mutate(functions, mutant)
        except MutantError:
            return None
        path = change.path.relative_to(ROOT)
        original = (tree / path).read_text(encoding="utf-8")
        (tree / path).write_text(change.text, encoding="utf-8")
        try:
            before = self._record.get(mutant)
            if before is not None and _still_kills(before, tree):
                return before
            with self._lock:
                tests = self._coverage.tests_of(path, change.lines)
            for verdict, is_slow in CLASSES:
                chosen = _within_limit([test for test in tests if test.slow is is_slow])
                if chosen and (killer := first_failure(chosen, tree)):
                    return Judgement(verdict, killer)
            return Judgement("none")
        finally:
            (tree / path).write_text(original, encoding="utf-8")


def _still_kills(judgement: Judgement, tree: Path) -> bool:
    """Return whether the test of a judgement is in a tree and fails."""
    if not judgement.test or not (tree / judgement.test.partition("::")[0]).exists():
        return False
    test = Test(judgement.test, SECONDS, judgement.verdict == "slow")
    return first_failure([test], tree) is not None


def _within_limit(tests: Sequence[Test]) -> list[Test]:
    """Return the first tests that take less than the limit together, at least one."""
    totals = accumulate(test.seconds for test in tests)
    count = len(list(takewhile(lambda total: total < SECONDS, totals)))
    return list(tests[: max(1, count)])


def _copy_tree(target: Path) -> Path:
    skipped = shutil.ignore_patterns("__pycache__", "runs")
    for name in COPIED:
        shutil.copytree(ROOT / name, target / name, ignore=skipped)
    for name in FILES:
        shutil.copy(ROOT / name, target / name)
    # Processes that write no bytecode would compile the packages for each mutant again.
    for package in ("hetero_fl", "model_zoo", "tests"):
        compileall.compile_dir(target / package, quiet=1)
    return target


if __name__ == "__main__":
    sys.exit(main())
