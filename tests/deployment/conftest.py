"""Fixtures for the deployment tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from hetero_fl.deployment import conversations
from hetero_fl.federation.client_runtime import ClientRuntime
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
    clock, end = Clock(), conversations.Conversations._finish

    def ended(self: conversations.Conversations, client: str, what: Any) -> None:
        end(self, client, what)
        if isinstance(what, ClientAbsentError | ClientLateError):
            clock.late.add(client)

    monkeypatch.setattr(conversations.Conversations, "_finish", ended)
    monkeypatch.setattr(conversations, "time", clock)
    return clock


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, int]]:
    """Count how often each client trains in each round, on whichever node."""
    counts: Counter[tuple[str, int]] = Counter()
    send = ClientRuntime._send

    def counted(
        self: ClientRuntime, client: Any, upload: Any, received: Any, request: Any, training: Any
    ) -> Any:
        counts[client.participant_id, request.round_idx] += 1
        return send(self, client, upload, received, request, training)

    monkeypatch.setattr(ClientRuntime, "_send", counted)
    return counts
