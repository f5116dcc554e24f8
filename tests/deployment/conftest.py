"""What tests of federations are handed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from hetero_fl.deployment import conversations
from hetero_fl.federation.client_runtime import Site
from hetero_fl.federation.executors.base import Absent, Late
from tests.helpers.nodes import LONG, Clock


@pytest.fixture(autouse=True)
def in_peace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has come has time to say who it is, and who is let go to take that in, however slow the machine."""
    monkeypatch.setattr(conversations, "GREETING", LONG)
    monkeypatch.setattr(conversations, "FAREWELL", LONG)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The server's from now on."""
    clock, end = Clock(), conversations.Talks._end

    def ended(self: conversations.Talks, client: str, what: Any) -> None:
        end(self, client, what)
        if isinstance(what, Absent | Late):
            clock.late.add(client)

    monkeypatch.setattr(conversations.Talks, "_end", ended)
    monkeypatch.setattr(conversations, "time", clock)
    return clock


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, int]]:
    """How often each client has trained in each round, at whatever node."""
    counts: Counter[tuple[str, int]] = Counter()
    train = Site._train

    def counted(self: Site, broadcasts: Any, requests: Any) -> Any:
        counts.update((client, requests[client].round) for client in broadcasts)
        return train(self, broadcasts, requests)

    monkeypatch.setattr(Site, "_train", counted)
    return counts
