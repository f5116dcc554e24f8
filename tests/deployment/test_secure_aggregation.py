"""A node's secrets serve one secure sum only, despite repetitions, crashes and old messages."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hetero_fl.communication.secure_aggregation.messages import REQUESTS, decode_arrays
from hetero_fl.deployment.transport import Envelope
from tests.helpers.nodes import (
    LONG,
    Clock,
    Killed,
    Losing,
    Sites,
    federation,
    records,
)
from tests.helpers.small_federations import config

CLIENTS = ["site_1", "site_2", "site_3"]
MADE = config("fedavg", "linear", rounds=3, channel={"secure_sum": {"threshold": 2}})
EXCHANGES = ["keys", "shares", "train", "unmask"]


class Heard(Losing):
    """A transport that records requests, and can repeat one after the server is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.tasks: list[tuple[int, Envelope]] = []

    def push(self, node: int, envelope: Envelope, within: float) -> str:
        number = super().push(node, envelope, within)
        if envelope.head["ask"] == "do" and envelope.head["kind"] == "answer":
            self.tasks.append((node, envelope))
        return number

    def again(self, node: int, envelope: Envelope) -> Envelope:
        """Repeat a request as another task."""
        head = {
            **envelope.head,
            "task": "another" + str(envelope.head["task"])[7:],
            "expires": time.time() + LONG,
        }
        self.last = None
        number = Losing.push(self, node, replace(envelope, head=head), LONG)
        while not (found := self.pull([number], 1.0)):
            pass
        answer = found[number]
        assert answer is not None
        return answer


@pytest.fixture
def heard() -> Iterator[Heard]:
    transport = Heard()
    yield transport
    transport.last = None
    transport.close()


def tag(envelope: Envelope) -> bytes:
    what = str(envelope.head["what"])
    return bytes(decode_arrays(envelope.body, REQUESTS[what])["tag"].tobytes())


@pytest.mark.slow
def test_exchanges_of_another_sum_are_refused(heard: Heard, tmp_path: Path) -> None:
    """Kill the server in round 2, restart that round, then repeat the first requests."""
    sites = Sites(CLIENTS, tmp_path / "sites", transport=heard)

    def die(envelopes: int) -> None:
        heard.last = envelopes
        with pytest.raises(Killed):
            federation(MADE, sites, tmp_path / "there", closing=False)

    # until all are ready, a round and its reading, keys and shares and two of train
    die(9 + 15 + 8)
    first = [(node, envelope) for node, envelope in heard.tasks if envelope.head["round"] == 1]
    assert {str(envelope.head["what"]) for _, envelope in first} == {"keys", "shares", "train"}
    heard.tasks.clear()
    die(9 + 8)
    second = [(node, envelope) for node, envelope in heard.tasks if envelope.head["round"] == 1]
    assert {tag(e) for _, e in first}.isdisjoint(tag(e) for _, e in second)
    answers = {
        str(e.head["what"]): heard.again(node, e) for node, e in first if e.head["what"] != "keys"
    }
    assert {what: answer.head.get("what") for what, answer in answers.items()} == dict.fromkeys(
        answers, "refused"
    )
    assert all(b"another round" in answer.body for answer in answers.values())
    # nor is the present one's training done twice, were it called another task
    node, train = next((node, e) for node, e in second if e.head["what"] == "train")
    assert b"out of order" in heard.again(node, train).body
    done = federation(MADE, sites, tmp_path / "there")
    assert [r["counts"]["arrived"] for r in records(done)] == [3, 3, 3]


def test_repeated_round_uses_new_secrets(heard: Heard, tmp_path: Path, clock: Clock) -> None:
    """Two of three clients are late, so the sum is abandoned and tried once more."""
    made = {
        **MADE,
        "cohort": {"least": 2, "too_few": "repeat", "attempts": 3, "deadline": LONG},
        "rounds": 1,
    }
    kills = {("site_1", 0, "shares"): "late", ("site_2", 0, "shares"): "late"}
    sites = Sites(CLIENTS, tmp_path / "sites", kills, transport=heard, clock=clock)
    (record,) = records(federation(made, sites, tmp_path / "there"))
    assert record["attempts"] == 2 and record["counts"]["arrived"] == 3
    seen: dict[bytes, set[str]] = {}
    for _, envelope in heard.tasks:
        seen.setdefault(tag(envelope), set()).add(str(envelope.head["what"]))
    assert list(seen.values()) == [{"keys", "shares"}, set(EXCHANGES)]
