"""Broadcasts: changes of an estimate, whatever is lost, and the cache of decoded messages."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from hetero_fl.algorithms import FedAvg
from hetero_fl.communication.model_changes import WHOLE, unpack_changes
from hetero_fl.communication.protocol import encoded
from hetero_fl.core.participant import Participant
from hetero_fl.core.payload import Item, Payload, PayloadError
from hetero_fl.core.plan import Plan
from hetero_fl.experiment import prepare
from hetero_fl.federation.broadcasts import (
    ESTIMATES_KEY,
    KEPT_CHANGES,
    EstimateBroadcasts,
    read_broadcast,
)
from hetero_fl.federation.client_runtime import MAX_BROADCASTS, BroadcastCache
from hetero_fl.federation.cost import expected_cost
from hetero_fl.federation.trainer import FederatedTrainer
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.serialization import encode
from tests.support import asynchronous_runs
from tests.support.cases import each_case
from tests.support.federations import MIXED, broadcasts, config, rounds_of, same_bits

DOWN = {"compress_down": [{"topk": 0.2}, {"quantize": 6}]}


CHAINS = {
    "topk": [{"topk": 0.2}, {"quantize": 6}],
    "randk": [{"randk": 0.3}],
    "lowrank": [{"lowrank": 0.8}, "half"],
}


EQUAL_SHAPES = [{"name": "mlp", "hidden": [24]}, {"name": "mlp", "hidden": [24], "dropout": 0.5}]


MODELS = ["cnn_bn_small", {"name": "mlp", "hidden": [24]}]


def broadcasts_of(trainer: FederatedTrainer) -> EstimateBroadcasts:
    assert isinstance(trainer.broadcasts, EstimateBroadcasts)
    return trainer.broadcasts


def check_estimates(trainer: FederatedTrainer) -> int:
    """Compare clients' estimates with the server's records; return the number of estimates."""
    broadcasts_by_client = broadcasts_of(trainer)
    present = {}
    for (item, _), estimate in broadcasts_by_client.estimates.items():
        if (last := estimate._last) is not None:
            present[item, last.name] = last.payload
    holders = 0
    for client_id in trainer.federation.client_infos:
        state = trainer.store.get(client_id).state.get(ESTIMATES_KEY, {})
        believed = broadcasts_by_client.known.names_of(client_id)
        assert {item: each["name"] for item, each in state.items()} == {
            item: name.hex() for item, name in believed.items()
        }
        holders += bool(state)
        for item, name in believed.items():
            if (payload := present.get((item, name))) is not None:
                assert same_bits(payload[item], state[item]["tensors"])
    return holders


@each_case("chain", CHAINS)
def test_server_and_clients_have_equal_estimates(chain: str) -> None:
    # Models of equal shapes have separate estimates.
    models = EQUAL_SHAPES if chain == "topk" else MODELS
    source = config("fedavg", models, 4, channel={"compress_down": CHAINS[chain]})
    trainer = rounds_of(source, num_rounds=0)

    for _ in range(3):
        assert not trainer.run_round()["failed"]
        assert check_estimates(trainer) == 4
    assert len(broadcasts_of(trainer).estimates) == 2


def test_estimates_follow_ef21_p() -> None:
    """Compare with EF21-P, w ← w + C(x − w), with top-k over all parameters of an architecture."""
    share = 0.1
    source = config(
        "fedavg", {"name": "mlp", "hidden": [24]}, 2, channel={"compress_down": [{"topk": share}]}
    )
    trainer = rounds_of(source, num_rounds=0)
    (group,) = trainer.server.models
    estimate: torch.Tensor | None = None
    for _ in range(4):
        x = torch.cat([t.reshape(-1) for _, t in sorted(trainer.server.models[group].items())])
        trainer.run_round()
        if estimate is None:
            # The first message contains the whole model.
            estimate = x.clone()
        else:
            change = x - estimate
            largest = change.abs().topk(-(-len(change) * 10 // 100)).indices
            estimate[largest] += change[largest]
        state = trainer.store.get("site_1").state[ESTIMATES_KEY]["model"]["tensors"]
        found = torch.cat([t.reshape(-1) for _, t in sorted(state.items())])
        torch.testing.assert_close(found, estimate, rtol=0, atol=1e-7)


def changes_in(body: bytes) -> list[int]:
    """Return the numbers of the changes in a message with one model."""
    ((_, _, _, changes),), _ = unpack_changes(body)
    return [change.number for change in changes]


def test_absent_client_receives_missed_changes_or_full_estimate() -> None:
    channel = {"compress_down": [{"topk": 0.01}, {"quantize": 4}]}
    trainer = rounds_of(config("fedavg", "cnn_bn_small", 2, channel=channel), num_rounds=1)
    broadcasts_by_client = broadcasts_of(trainer)
    info = trainer.federation.client_infos["site_2"]

    for version in range(2, KEPT_CHANGES + 5):
        broadcasts_by_client.begin(version, version, trainer.server.arch.values())
        # The other client trains; this one is only evaluated.
        broadcasts_by_client.content(info, trainer.broadcast(info))
        (body,) = broadcasts(trainer, ["site_1"], for_evaluation=True).values()
        missed = list(range(2, version + 1))
        assert changes_in(body) == (missed if len(missed) <= KEPT_CHANGES else [WHOLE])
        estimate = trainer.store.get("site_1").state[ESTIMATES_KEY]
        received = read_broadcast(trainer.links, version, body, estimate)
        expected = broadcasts_by_client.received(info, trainer.broadcast(info))
        assert same_bits(received["model"], expected["model"])


def test_evaluation_changes_nothing() -> None:
    """Include models that are not trained in every round."""
    states = []
    for evaluates in (False, True):
        source = config("fedavg", MODELS, 4, channel=DOWN, rounds=5, clients__per_round=1)
        trainer = rounds_of(source, num_rounds=0)
        for _ in range(5):
            assert not trainer.run_round()["failed"]
            if evaluates:
                trainer.evaluate()
        states.append(trainer.broadcasts.state_dict() | {"models": trainer.server.models})
    assert encode(states[0], "x") == encode(states[1], "x")


def test_clients_of_different_cohorts_share_an_estimate() -> None:
    source = config("fedavg", "linear", 6, channel=DOWN, rounds=8, clients__per_round=2)
    trainer = rounds_of(source, num_rounds=0)
    for _ in range(8):
        assert not trainer.run_round()["failed"]
        check_estimates(trainer)
    broadcasts_by_client = broadcasts_of(trainer)
    assert len(broadcasts_by_client.estimates) == 1
    # Nothing is stored for clients whose uploads have arrived.
    assert not broadcasts_by_client.known.sent


def test_change_of_an_unknown_base_is_refused() -> None:
    trainer = rounds_of(config("fedavg", "linear", 2, channel=DOWN), num_rounds=1)
    (body,) = broadcasts(trainer, ["site_1"], for_evaluation=True).values()
    estimate = trainer.store.get("site_1").state[ESTIMATES_KEY]
    other = {"model": {**estimate["model"], "name": "00" * 8}}
    for wrong in (None, other):
        with pytest.raises(PayloadError, match="changes an unknown estimate"):
            read_broadcast(trainer.links, 1, body, wrong)
    for size in (0, 1, 10, 30, 50):
        with pytest.raises(PayloadError, match="truncated: expected"):
            read_broadcast(trainer.links, 1, body[:size], estimate)


class Personal(FedAvg):
    """A method that sends each client a different model."""

    def broadcast(self, server: Participant, recipient: Any) -> dict[str, Any]:
        items = dict(super().broadcast(server, recipient))
        shift = float(recipient.client_id.removeprefix("site_"))
        return {n: {k: t + shift for k, t in v.items()} for n, v in items.items()}


class DeclaredPersonal(Personal):
    """The same method with this fact declared."""

    needs = replace(FedAvg.needs, models_per_client=True)


def test_undeclared_personal_broadcast_is_refused() -> None:
    source = config(f"python:{__name__}:Personal", "linear", 3, channel=DOWN)
    with pytest.raises(UserError, match=r"Needs\(models_per_client=True\)"):
        rounds_of(source, num_rounds=0).run_round()

    source = config(f"python:{__name__}:DeclaredPersonal", "linear", 3, channel=DOWN)
    trainer = rounds_of(source, num_rounds=0)
    for _ in range(2):
        assert not trainer.run_round()["failed"]
        assert check_estimates(trainer) == 3
    assert len(broadcasts_of(trainer).estimates) == 3


class Careless(FedAvg):
    """A method whose clients replace their state and zero received tensors in place."""

    def train(self, client: Participant, received: Payload) -> Plan[dict[str, Any]]:
        items = yield from super().train(client, received)
        client.state = {"received": 1}
        for tensor in received["model"].values():
            tensor.zero_()
        return items


def test_method_cannot_change_estimates() -> None:
    source = config(f"python:{__name__}:Careless", MODELS, 4, channel=DOWN)
    trainer = rounds_of(source, num_rounds=0)

    for _ in range(2):
        assert not trainer.run_round()["failed"]
        assert check_estimates(trainer) == 4


@each_case("too_few", ["skip", "repeat"])
def test_lost_broadcasts_change_no_estimates(too_few: str) -> None:
    source = config(
        "fedavg",
        MODELS,
        6,
        channel=DOWN,
        rounds=5,
        clients__per_round=4,
        devices={"speed": {"median": 1e6, "sigma": 0.9}, "up": 1e5},
        faults={"lost": 0.3, "corrupted": 0.2, "during": 0.1},
        cohort={"least": 2, "too_few": too_few},
    )
    trainer = rounds_of(source, num_rounds=0)
    failed = 0
    for _ in range(5):
        failed += len(trainer.run_round()["failed"])
        check_estimates(trainer)
    assert failed > 2


def test_asynchronous_run_tracks_estimates_per_task() -> None:
    run_config = asynchronous_runs.source("fedavg", runtime__buffer=None, channel=DOWN)
    trainer = prepare(run_config).make_trainer()
    for _ in range(4):
        trainer.run_round()
    assert check_estimates(trainer) > 1


@each_case(("chain", "every"), itertools.product(CHAINS, [1, 3, 50]))
def test_cost_counts_missed_changes(every: int, chain: str) -> None:
    models = {1: MODELS, 3: EQUAL_SHAPES, 50: "linear"}[every]
    rounds = KEPT_CHANGES + 6
    channel = {"compress_down": CHAINS[chain]}
    source = config("fedavg", models, 6, channel=channel, rounds=rounds, clients__per_round=1)
    prepared = prepare(source)
    trainer = prepared.make_trainer()
    evaluated = 0
    for number in range(1, rounds + 1):
        assert not trainer.run_round()["failed"]
        before = trainer.traffic.down
        if number % every == 0 or number == rounds:
            trainer.evaluate()
        evaluated += trainer.traffic.down - before

    cost = expected_cost(prepared.method, prepared.federation, rounds, 1, every=every)

    estimated = (cost.down.total(), cost.evaluation.total())
    counted = (trainer.traffic.down - evaluated, evaluated)
    if cost.is_upper_bound:
        assert estimated[0] >= counted[0] and estimated[1] >= counted[1]
    else:
        assert estimated == counted


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
    return Mock(side_effect=lambda client_id, round_idx, content: Payload.decode(encoded(content)))


def test_equal_messages_are_decoded_once(decode: Mock) -> None:
    cache = BroadcastCache(decode)
    first, second = cache.get("a", 0, BODIES[0]), cache.get("b", 0, BODIES[0])
    assert decode.call_count == 1 and first["model"]["w"] is second["model"]["w"]
    assert (
        cache.get("a", 0, BODIES[1])["model"]["w"].tolist() == [1.0] * 3 and decode.call_count == 2
    )
    # With compression, equal bytes mean different tensors in different rounds.
    cache.get("a", 1, BODIES[0])
    assert decode.call_count == 3
    # The entry of the other round was removed.
    cache.get("a", 0, BODIES[0])
    assert decode.call_count == 4


def test_clients_get_separate_dictionaries(decode: Mock) -> None:
    cache = BroadcastCache(decode)
    received = cache.get("a", 0, BODIES[0])
    received["model"]["w"] = torch.full((3,), 9.0)
    del received.items_by_name["rows"]
    received.report["more"] = 1
    again = cache.get("b", 0, BODIES[0])
    assert (
        set(again) == {"model", "rows"}
        and again["model"]["w"].tolist() == [0.0] * 3
        and not again.report
    )


def test_cache_size_is_limited(decode: Mock) -> None:
    cache = BroadcastCache(decode)
    for body in BODIES:
        cache.get("a", 0, body)
    for body in BODIES[-MAX_BROADCASTS:]:
        cache.get("a", 0, body)
    assert decode.call_count == len(BODIES)
    cache.get("a", 0, BODIES[0])
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
        for (client, body), sent in zip(bodies.items(), before, strict=True):
            received = runtime.broadcast_cache.get(client, 1, body)
            assert all(torch.equal(t, sent["model"][n]) for n, t in received["model"].items())
    assert losses[0] == losses[1]
