"""Compression in complete runs: every method, cost, workers, residuals, and empty chains."""

from __future__ import annotations

from typing import Any

import torch

from hetero_fl.communication.link import UNSENT
from hetero_fl.core.payload import Payload
from hetero_fl.experiment import prepare
from hetero_fl.federation.cost import expected_cost
from tests.support.cases import each_case
from tests.support.federations import TOP, broadcasts, config, rounds_of, same_bits

MODELS = ["cnn_bn_small", {"name": "mlp", "hidden": [24]}]


@each_case("changes", [{"entropy": True}, {"compress": [{"lowrank": 0.9}, {"quantize": 8}]}])
def test_cost_is_an_upper_bound_for_value_dependent_sizes(
    changes: dict[str, Any],
) -> None:
    prepared = prepare(config("fedavg", MODELS, 4, channel={**TOP, **changes}))
    rounds = prepared.make_trainer()
    for _ in range(2):
        rounds.run_round()
    cost = expected_cost(prepared.method, prepared.federation, 2)
    assert cost.is_upper_bound
    assert (
        0.3 * cost.up.total() < rounds.traffic.up <= cost.up.total()
        and rounds.traffic.down <= cost.down.total()
    )


@each_case("empty", [{}, {"channel": {}}, {"channel": {"compress": [], "entropy": True}}])
def test_empty_chain_changes_nothing(empty: dict[str, Any]) -> None:
    rounds = rounds_of(config("hybrid", MODELS, 4, **empty), num_rounds=0)
    bodies = dict(broadcasts(rounds, rounds.sample_cohort(0)))
    assert all(Payload.decode(body).encode() == body for body in bodies.values())
    rounds.run_round()
    assert not any(UNSENT in rounds.store.get(c).state for c in rounds.federation.client_infos)


def test_batch_norm_statistics_are_not_compressed() -> None:
    plain, cut = (
        rounds_of(config("fedavg", "cnn_bn_small", 1, **c), num_rounds=1)
        for c in ({}, {"channel": TOP})
    )
    (group,) = plain.server.models
    names = [n for n in plain.server.models[group] if "running" in n]
    for n in names:
        assert torch.equal(plain.server.models[group][n], cut.server.models[group][n])
    weights = plain.server.arch[group].parameter_names
    assert names and not any(
        torch.equal(plain.server.models[group][n], cut.server.models[group][n]) for n in weights
    )


def test_random_selection_is_decoded_at_its_positions() -> None:
    source = config("fedavg", {"name": "mlp", "hidden": [24]}, 1)
    start = rounds_of(source, num_rounds=0).server.models
    dense, cut = (
        rounds_of(source, num_rounds=1),
        rounds_of({**source, "channel": {"compress": [{"randk": 0.25}]}}, num_rounds=1),
    )
    (group,) = start
    count = 0
    for n, t in dense.server.models[group].items():
        came = cut.server.models[group][n] - start[group][n]
        assert torch.allclose(
            came[came != 0], 4 * (t - start[group][n])[came != 0], rtol=1e-2, atol=1e-6
        )
        count += int((came != 0).sum())
    total = sum(t.numel() for t in start[group].values())
    assert 0.2 * total < count <= -(-total // 4)


def kept_by(rounds: Any) -> dict[str, Any]:
    return {
        c: rounds.store.get(c).state.get(UNSENT, {}).get("model")
        for c in rounds.federation.client_infos
    }


def test_residual_survives_absence_and_refused_uploads() -> None:
    rounds = rounds_of(config("fedavg", MODELS, 4, clients__per_round=3, channel=TOP), num_rounds=2)
    for _ in range(4):
        before, absent = (
            kept_by(rounds),
            set(rounds.federation.client_infos) - set(rounds.sample_cohort(rounds.completed)),
        )
        (lost, *others), receive = (
            rounds.sample_cohort(rounds.completed),
            rounds.decode_upload,
        )

        def refusing(
            client: Any, data: bytes, *rest: Any, lost: str = lost, receive: Any = receive
        ) -> Payload:
            return receive(client, data[:-1] if client.client_id == lost else data, *rest)

        rounds.decode_upload = refusing  # type: ignore[method-assign]
        assert set(rounds.run_round()["failed"]) == {lost}
        rounds.decode_upload = receive  # type: ignore[method-assign]
        after = kept_by(rounds)
        for client in (*absent, lost):
            assert (before[client] is None) == (after[client] is None)
            assert before[client] is None or same_bits(before[client], after[client])
        assert all(before[c] is None or not same_bits(before[c], after[c]) for c in others)


def test_clients_of_a_group_receive_the_same_broadcast() -> None:
    source = config("fedavg", MODELS, 4, channel={"compress_down": [{"quantize": 4}]})
    rounds = rounds_of(source, num_rounds=0)
    bodies = dict(broadcasts(rounds, rounds.sample_cohort(0)))
    assert len(set(bodies.values())) == 2
    for client, body in bodies.items():
        client_info = rounds.federation.client_infos[client]
        got = rounds.links.decode_broadcast(0, body)["model"]
        received = rounds.links.simulate_broadcast(
            0, rounds.broadcast(client_info), rounds.server.arch.values()
        )["model"]
        assert same_bits(got, received)
        weight = next(n for n, t in got.items() if t.ndim > 1)
        assert (
            len(got[weight].unique())
            <= 15
            < len(rounds.server.models[client_info.arch.spec_id][weight].unique())
        )
