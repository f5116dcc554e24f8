"""Fixtures for the deployment tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from hetero_fl.deployment import remote_executor, sites
from hetero_fl.federation.executors.base import ClientAbsentError, ClientLateError
from tests.support.nodes import Clock, patient_nodes


@pytest.fixture(autouse=True)
def in_peace() -> Iterator[None]:
    """Give nodes ample time to answer, however slow the machine."""
    with patient_nodes():
        yield


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Replace the server's clock by one that the test controls."""
    clock, end = Clock(), remote_executor.Requests._finish

    def ended(self: remote_executor.Requests, client: str, what: Any) -> None:
        end(self, client, what)
        if isinstance(what, ClientAbsentError | ClientLateError):
            clock.late.add(client)

    monkeypatch.setattr(remote_executor.Requests, "_finish", ended)
    for module in (remote_executor, sites):
        monkeypatch.setattr(module, "time", clock)
    return clock
