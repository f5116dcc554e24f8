"""Fixtures of the reporting tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp

import pytest

from hetero_fl.reporting.run_directory import RunDirectory
from tests.support.run_directories import Case, write_run


@pytest.fixture
def made_run(tmp_path: Path) -> Callable[..., RunDirectory]:
    """Return a function that writes a run described by the keywords of `Case` to a new folder."""

    def make(**settings: object) -> RunDirectory:
        return write_run(Path(mkdtemp(dir=tmp_path)) / "run", Case(**settings))  # type: ignore[arg-type]

    return make
