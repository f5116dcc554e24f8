"""Fixtures for the deployment tests."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from hetero_fl.deployment import conversations
from hetero_fl.federation.client_runtime import ClientRuntime
from hetero_fl.federation.executors.base import ClientAbsentError, ClientLateError
from model_zoo import generators
from tests.support.nodes import LONG, Clock


@pytest.fixture(autouse=True)
def in_peace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give nodes ample time to greet and to take in a farewell, however slow the machine."""
    monkeypatch.setattr(conversations, "GREETING_SECONDS", LONG)
    monkeypatch.setattr(conversations, "LEAVE_SECONDS", LONG)


@pytest.fixture(autouse=True)
def one_generator_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let server and nodes take turns with the global generators, which their process shares.

    Two threads that read its state at the same time can also block each other forever.
    """
    lock = threading.RLock()
    keyed = generators.keyed_generators

    @contextmanager
    def locked(*args: Any, **kwargs: Any) -> Iterator[None]:
        with lock, keyed(*args, **kwargs):
            yield

    def locked_function(function: Any) -> Any:
        def call(*args: Any) -> Any:
            with lock:
                return function(*args)

        return call

    for name in ("read_states", "write_states"):
        monkeypatch.setattr(generators, name, locked_function(getattr(generators, name)))
    for module in list(sys.modules.values()):
        if vars(module).get("keyed_generators") is keyed:
            monkeypatch.setattr(module, "keyed_generators", locked)


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
