"""Fixtures of the experiment tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from hetero_fl.experiment.comparison import compare as comparison
from hetero_fl.experiment.comparison.jobs import Job, run_job


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run comparisons in this process and return the folder names of the runs."""
    ran: list[str] = []

    def run_jobs(
        source: Any,
        base: Sequence[str],
        jobs: Sequence[Job],
        *_: Any,
        allow_code: Any = False,
        **__: Any,
    ) -> Iterator[tuple[Job, str | None]]:
        for job in jobs:
            run_job(source, [*base, *job.overrides], job.out, allow_code)
            ran.append(job.out.name)
            yield job, None

    monkeypatch.setattr(comparison, "run_jobs", run_jobs)
    return ran
