"""The cache of decoded broadcasts."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest
import torch

from hetero_fl.algorithms import FedAvg
from hetero_fl.communication.protocol import encoded
from hetero_fl.core.participant import Participant
from hetero_fl.core.payload import Item, Payload
from hetero_fl.core.plan import Plan
from hetero_fl.federation.client_runtime import MAX_BROADCASTS, BroadcastCache
from tests.support.cases import each_case
from tests.support.federations import MIXED, broadcasts, config, rounds_of

BODIES = [
    Payload(
        {
            "model": Item({"w": torch.full((3,), float(i))}, kind="params"),
            "rows": Item(torch.ones(2, 2), torch.ones(2, 1)),
        }
    ).encode()
    for i in range(MAX_BROADCASTS + 2)
]


@pytest.fixture
def decode() -> Mock:
    """Return a decoder that counts its calls."""
    return Mock(side_effect=lambda round_idx, content: Payload.decode(encoded(content)))


def test_equal_messages_are_decoded_once(decode: Mock) -> None:
    cache = BroadcastCache(decode)
    first, second = cache.get(0, BODIES[0]), cache.get(0, BODIES[0])
    assert decode.call_count == 1 and first["model"]["w"] is second["model"]["w"]
    assert cache.get(0, BODIES[1])["model"]["w"].tolist() == [1.0] * 3 and decode.call_count == 2
    # With compression, equal bytes mean different tensors in different rounds.
    cache.get(1, BODIES[0])
    assert decode.call_count == 3
    # The entry of the other round was removed.
    cache.get(0, BODIES[0])
    assert decode.call_count == 4


def test_clients_get_separate_dictionaries(decode: Mock) -> None:
    cache = BroadcastCache(decode)
    received = cache.get(0, BODIES[0])
    received["model"]["w"] = torch.full((3,), 9.0)
    del received.items_by_name["rows"]
    received.report["more"] = 1
    again = cache.get(0, BODIES[0])
    assert (
        set(again) == {"model", "rows"}
        and again["model"]["w"].tolist() == [0.0] * 3
        and not again.report
    )


def test_cache_size_is_limited(decode: Mock) -> None:
    cache = BroadcastCache(decode)
    for body in BODIES:
        cache.get(0, body)
    for body in BODIES[-MAX_BROADCASTS:]:
        cache.get(0, body)
    assert decode.call_count == len(BODIES)
    cache.get(0, BODIES[0])
    assert decode.call_count == len(BODIES) + 1


class OwnMethod(FedAvg):
    """A user-defined method whose clients change received tensors in place."""

    def personalize(self, client: Participant, received: Payload) -> Plan[None]:
        for tensor in received["model"].values():
            tensor.data.mul_(0.5)
            tensor.numpy()[...] += 1
        client.load("model", received["model"])
        yield from ()


@each_case("chunk", [1, 6])
def test_custom_method_may_change_received_tensors(chunk: int) -> None:
    losses: list[dict[str, Any]] = []
    for size in (1, chunk):
        trainer = rounds_of(config(f"python:{__name__}:OwnMethod", MIXED, clients=6), num_rounds=1)
        runtime = trainer.executor.runtime  # type: ignore[attr-defined]
        bodies = broadcasts(trainer, list(trainer.federation.client_infos), for_evaluation=True)
        before = [Payload.decode(body) for body in bodies.values()]
        found: dict[str, Any] = {}
        for start in range(0, len(bodies), size):
            chosen = dict(list(bodies.items())[start : start + size])
            found |= {c: e.scores for c, e in runtime.evaluate(chosen, 1).items()}
        losses.append(found)
        for body, sent in zip(bodies.values(), before, strict=True):
            received = runtime.broadcast_cache.get(1, body)
            assert all(torch.equal(t, sent["model"][n]) for n, t in received["model"].items())
    assert losses[0] == losses[1]
