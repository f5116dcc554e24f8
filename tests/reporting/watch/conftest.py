"""Fixtures of the tests of the live page."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from hetero_fl.reporting.run_directory import RunDirectory
from tests.support.run_directories import Case, write_run


@pytest.fixture
def three_runs(tmp_path: Path) -> Iterator[list[Path]]:
    """Write two finished runs to the folder of a comparison, and one run in progress."""
    for number, name in enumerate(("fedavg", "hybrid")):
        out = tmp_path / "comparison" / "runs" / f"{name}-seed0"
        write_run(out, Case(rounds=6, algorithm=name), seed=number)
    live = write_run(tmp_path / "live", Case(rounds=8, algorithm="fedmd", server=False), seed=2)
    (live.path / "summary.json").unlink()
    shutil.rmtree(live.path / "plots", ignore_errors=True)
    live.rewind_metrics(5)
    record = live.metrics()[4] | {"privacy": {"epsilon": 1.5, "delta": 1e-5, "unit": "record"}}
    live.rewind_metrics(4)
    live.append_metrics(record)
    with FileLock(live.path / ".lock"):
        yield [tmp_path / "comparison", live.path]


@pytest.fixture
def live(three_runs: list[Path]) -> RunDirectory:
    """Return the run in progress."""
    return RunDirectory(three_runs[1])
