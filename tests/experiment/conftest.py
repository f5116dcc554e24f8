"""Fixtures of the experiment tests."""

from __future__ import annotations

from typing import Any

import pytest

from hetero_fl.experiment.comparison import compare as comparison
from hetero_fl.experiment.comparison.jobs import ComparisonJob, run_job


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run comparisons in this process and return the folder names of the runs."""
    ran: list[str] = []

    def run_jobs(
        source: Any,
        base: list[str],
        work: list[ComparisonJob],
        jobs: int,
        progress: Any,
        *,
        allow_code: Any = False,
    ) -> dict[ComparisonJob, str]:
        for job in work:
            run_job(source, [*base, *job.overrides], job.out, allow_code)
            ran.append(job.out.name)
        return {}

    monkeypatch.setattr(comparison, "run_jobs", run_jobs)
    return ran
