"""A node's secrets serve one secure sum only, despite repetitions, crashes and old messages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hetero_fl.communication.named_arrays import decode_arrays
from hetero_fl.communication.secure_aggregation.messages import REQUESTS
from hetero_fl.deployment.transport import Envelope
from tests.support.federations import config
from tests.support.nodes import (
    LONG,
    Clock,
    RecordingTransport,
    ServerKilledError,
    Sites,
    federation,
    records,
)

CLIENTS = ["site_1", "site_2", "site_3"]
CONFIG = config(
    "fedavg",
    "linear",
    rounds=3,
    channel={"secure_sum": {"threshold": 2}},
    # Each evaluation takes place once.
    output__best_models=False,
)
EXCHANGES = ["keys", "shares", "train", "consistency", "unmask"]


@pytest.fixture
def transport() -> Iterator[RecordingTransport]:
    transport = RecordingTransport()
    yield transport
    transport.last = None
    transport.close()


def tag(envelope: Envelope) -> bytes:
    what = str(envelope.head["what"])
    return bytes(decode_arrays(envelope.body, REQUESTS[what])["tag"].tobytes())


@pytest.mark.slow
def test_exchanges_of_another_sum_are_refused(
    transport: RecordingTransport, tmp_path: Path
) -> None:
    """Kill the server in round 2, restart that round, then repeat the first requests."""
    sites = Sites(CLIENTS, tmp_path / "sites", transport=transport)

    def run_until(envelopes: int) -> None:
        transport.last = envelopes
        with pytest.raises(ServerKilledError):
            federation(CONFIG, sites, tmp_path / "deployed", closing=False)

    # until all are ready, a round and its reading, keys and shares and two of train
    run_until(9 + 18 + 8)
    first = [(node, envelope) for node, envelope in transport.tasks if envelope.head["round"] == 1]
    assert {str(envelope.head["what"]) for _, envelope in first} == {"keys", "shares", "train"}
    transport.tasks.clear()
    run_until(9 + 8)
    second = [(node, envelope) for node, envelope in transport.tasks if envelope.head["round"] == 1]
    assert {tag(e) for _, e in first}.isdisjoint(tag(e) for _, e in second)
    answers = {
        str(e.head["what"]): transport.repeat(node, e)
        for node, e in first
        if e.head["what"] != "keys"
    }
    assert {what: answer.head.get("what") for what, answer in answers.items()} == dict.fromkeys(
        answers, "refused"
    )
    assert all(b"another round" in answer.body for answer in answers.values())
    # Training of the current round is not repeated under another task name.
    node, train = next((node, e) for node, e in second if e.head["what"] == "train")
    assert b"out of order" in transport.repeat(node, train).body
    done = federation(CONFIG, sites, tmp_path / "deployed")
    assert [r["counts"]["arrived"] for r in records(done)] == [3, 3, 3]


def test_repeated_round_uses_new_secrets(
    transport: RecordingTransport, tmp_path: Path, clock: Clock
) -> None:
    """Two of three clients are late, so the sum is abandoned and tried once more."""
    result = {
        **CONFIG,
        "cohort": {"least": 2, "too_few": "repeat", "attempts": 3, "deadline": LONG},
        "rounds": 1,
    }
    kills = {("site_1", 0, "shares"): "late", ("site_2", 0, "shares"): "late"}
    sites = Sites(CLIENTS, tmp_path / "sites", kills, transport=transport, clock=clock)
    (record,) = records(federation(result, sites, tmp_path / "deployed"))
    assert record["attempts"] == 2 and record["counts"]["arrived"] == 3
    seen: dict[bytes, set[str]] = {}
    for _, envelope in transport.tasks:
        seen.setdefault(tag(envelope), set()).add(str(envelope.head["what"]))
    assert list(seen.values()) == [{"keys", "shares"}, set(EXCHANGES)]
