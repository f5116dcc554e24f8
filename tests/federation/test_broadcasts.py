"""The cache of decoded broadcasts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hetero_fl.algorithms import FedAvg
from hetero_fl.core.participant import Participant
from hetero_fl.core.payload import Item, Payload
from hetero_fl.core.plan import Plan
from hetero_fl.federation.client_runtime import MAX_BROADCASTS, ClientRuntime
from tests.support.calls import record_results
from tests.support.cases import each_case
from tests.support.federations import MIXED, broadcasts, config, rounds_of, runtime_of


@pytest.fixture
def runtime() -> ClientRuntime:
    return runtime_of(rounds_of(config("fedavg", "mlp"), num_rounds=0))


@pytest.fixture
def decoded(runtime: ClientRuntime, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list of the decoded broadcasts."""
    return record_results(monkeypatch, runtime, "_decode_broadcast")


BODIES = [
    Payload(
        {
            "model": Item({"w": torch.full((3,), float(i))}, kind="params"),
            "rows": Item(torch.ones(2, 2), torch.ones(2, 1)),
        }
    ).encode()
    for i in range(MAX_BROADCASTS + 2)
]


def test_equal_messages_are_decoded_once(runtime: ClientRuntime, decoded: list[Any]) -> None:
    first, second = runtime.receive(0, BODIES[0]), runtime.receive(0, BODIES[0])
    assert len(decoded) == 1 and first["model"]["w"] is second["model"]["w"]
    assert runtime.receive(0, BODIES[1])["model"]["w"].tolist() == [1.0] * 3 and len(decoded) == 2
    # With compression, equal bytes mean different tensors in different rounds.
    runtime.receive(1, BODIES[0])
    assert len(decoded) == 3
    # The entry of the other round was removed.
    runtime.receive(0, BODIES[0])
    assert len(decoded) == 4


def test_clients_get_separate_dictionaries(runtime: ClientRuntime) -> None:
    received = runtime.receive(0, BODIES[0])
    received["model"]["w"] = torch.full((3,), 9.0)
    del received.items_by_name["rows"]
    received.report["more"] = 1
    again = runtime.receive(0, BODIES[0])
    assert (
        set(again) == {"model", "rows"}
        and again["model"]["w"].tolist() == [0.0] * 3
        and not again.report
    )


def test_cache_size_is_limited(runtime: ClientRuntime, decoded: list[Any]) -> None:
    for body in BODIES:
        runtime.receive(0, body)
    for body in BODIES[-MAX_BROADCASTS:]:
        runtime.receive(0, body)
    assert len(decoded) == len(BODIES)
    runtime.receive(0, BODIES[0])
    assert len(decoded) == len(BODIES) + 1


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
            received = runtime.receive(1, body)
            assert all(torch.equal(t, sent["model"][n]) for n, t in received["model"].items())
    assert losses[0] == losses[1]
