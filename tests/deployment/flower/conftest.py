"""Fixtures for tests of what runs inside Flower's processes."""

from __future__ import annotations

import pytest


@pytest.fixture
def flower_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process one that Flower has started for an app: its messages belong to a run."""
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
