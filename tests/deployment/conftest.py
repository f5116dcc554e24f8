"""What tests of federations are handed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from hetero_fl.deployment import conversations
from hetero_fl.federation.client_runtime import ClientRuntime
from hetero_fl.federation.executors.base import ClientAbsentError, ClientLateError
from tests.helpers.nodes import LONG, Clock


@pytest.fixture(autouse=True)
def in_peace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has come has time to say who it is, and who is let go to take that in, however slow the machine."""
    monkeypatch.setattr(conversations, "GREETING", LONG)
    monkeypatch.setattr(conversations, "FAREWELL", LONG)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The server's from now on."""
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
    """How often each client has trained in each round, at whatever node."""
    counts: Counter[tuple[str, int]] = Counter()
    send = ClientRuntime._send

    def counted(
        self: ClientRuntime, client: Any, upload: Any, received: Any, request: Any, training: Any
    ) -> Any:
        counts[client.participant_id, request.round_idx] += 1
        return send(self, client, upload, received, request, training)

    monkeypatch.setattr(ClientRuntime, "_send", counted)
    return counts
