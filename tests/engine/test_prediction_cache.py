"""The prediction cache: equal models are evaluated once, and caching changes no result."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hetero_fl.aggregation import Uploads
from hetero_fl.algorithms import FedAvg
from hetero_fl.core.participant import Participant
from hetero_fl.core.plan import ClassSums, Predict, Rows
from hetero_fl.data.federated_data import column_cache
from hetero_fl.engine.device_memory import DeviceMemory
from hetero_fl.engine.serial import SerialBackend
from hetero_fl.engine.vectorized import make_backend
from hetero_fl.experiment import prepare
from hetero_fl.federation.executors.base import client_chunks
from hetero_fl.federation.store import PrivateState
from hetero_fl.federation.trainer import FederatedTrainer
from tests.support.calls import record_calls
from tests.support.cases import each_case
from tests.support.federations import MIXED, config, rounds_of, set_method

CPU = torch.device("cpu")


def clients(**changes: Any) -> list[Participant]:
    rounds = rounds_of(config("fedavg", "mlp", clients=6, **changes), num_rounds=0)
    return [
        rounds.federation.client(client_id, rounds.store.get(client_id), 0)
        for client_id in rounds.federation.client_infos
    ]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Record the steps of the outputs that `SerialBackend` computes together."""
    return record_calls(monkeypatch, SerialBackend, "_outputs", lambda _, client, steps: steps)


def predictions(computed: list[Any], name: str) -> int:
    """Count the prediction steps on the set of that name."""
    steps = [step for call in computed for step in call]
    return sum(isinstance(step, Predict) and step.data.name == name for step in steps)  # type: ignore[union-attr]


@each_case(("method", "count"), [("fedavg", 1), ("ensemble", 6)])
def test_each_model_predicts_global_rows_once(method: str, count: int, computed: list[Any]) -> None:
    """After FedAvg, all clients have equal models. An ensemble has six members."""
    rounds = rounds_of(config(method, "mlp", clients=6), num_rounds=1)
    computed.clear()
    rounds.evaluate()
    assert predictions(computed, "common_test") == count


@each_case("chunk", [1, 16])
def test_freed_columns_are_not_confused(chunk: int) -> None:
    """Reuse the addresses of columns that were freed."""
    people = clients(clients__defaults={"preprocess": {"normalize": "own"}})
    for participant in people:
        participant.models["model"] = people[0].models["model"]
    result = prepare(
        config("fedavg", "mlp", clients=6, clients__defaults={"preprocess": {"normalize": "own"}})
    )
    result.federation.data._public_columns = column_cache(1)
    fresh = [result.federation.client(p.participant_id, PrivateState(), 0) for p in people]
    work = [(p, Predict("model", Rows("common_test"))) for p in fresh]
    together = make_backend(DeviceMemory(CPU), chunk).run(work)
    for one, (p, step) in zip(together, work, strict=True):
        assert torch.allclose(one, SerialBackend(DeviceMemory(CPU)).run([(p, step)])[0], atol=1e-6)


def test_model_changed_in_place_is_evaluated_again() -> None:
    (participant, *_), backend = clients(), make_backend(DeviceMemory(CPU))
    step = Predict("model", Rows("common_test"))
    before = backend.run([(participant, step)])[0].clone()
    for tensor in participant.models["model"].values():
        tensor.mul_(2)
    assert not torch.equal(backend.run([(participant, step)])[0], before)


def test_cached_results_do_not_change_chunks() -> None:
    people = clients(clients__defaults={"preprocess": {"normalize": "own"}})
    work = [(p, Predict("model", Rows("common_test"))) for p in people[:2]]
    cold, warm = make_backend(DeviceMemory(CPU), 16), make_backend(DeviceMemory(CPU), 16)
    warm.run(work[:1])
    assert all(torch.equal(a, b) for a, b in zip(cold.run(work), warm.run(work), strict=True))


def test_predictions_on_zero_rows_are_batched() -> None:
    work = [
        (p, Predict("model", Rows("train", rows=torch.tensor([], dtype=torch.int64))))
        for p in clients()[:3]
    ]
    assert [tuple(z.shape) for z in make_backend(DeviceMemory(CPU), 16).run(work)] == [(0, 10)] * 3
    assert isinstance(work[0][1], Predict) and not isinstance(work[0][1], ClassSums)


def test_chunks_follow_the_order_of_results() -> None:
    rounds = rounds_of(config("local", MIXED, clients=6), num_rounds=0)
    result = client_chunks(rounds.federation.client_infos, rounds.federation.client_infos, 2)
    firsts = [list(rounds.federation.client_infos).index(chunk[0]) for chunk in result]
    assert firsts == sorted(firsts) and sorted(
        client_id for chunk in result for client_id in chunk
    ) == sorted(rounds.federation.client_infos)


class Noisy(FedAvg):
    """A method whose broadcast draws random numbers."""

    def broadcast(self, server: Participant, recipient: Any) -> Any:
        items = super().broadcast(server, recipient)
        key = server.stream("noise")
        noise = torch.randn((), generator=torch.Generator().manual_seed(hash(str(key)) % 2**31))
        SEEN.append((recipient.client_id, float(noise)))
        return items


SEEN: list[tuple[str, float]] = []


def test_random_draws_of_broadcasts_are_keyed_by_client() -> None:
    rounds = rounds_of(config("fedavg", "mlp"), num_rounds=0)
    SEEN.clear()
    set_method(rounds, Noisy())
    for client_info in rounds.federation.client_infos.values():
        rounds.link.broadcast(client_info)
    rounds.run_round()
    drawn: dict[str, set[float]] = {}
    for client, value in SEEN:
        drawn.setdefault(client, set()).add(value)
    assert len(SEEN) > len(drawn) and all(len(values) == 1 for values in drawn.values())
    assert len(set.union(*drawn.values())) == len(drawn)


class Failing(FedAvg):
    """A method whose aggregation fails."""

    def aggregate(self, server: Participant, uploads: Uploads) -> Iterator[Any]:  # type: ignore[override]
        yield from ()
        raise RuntimeError("no")


def test_failed_round_clears_the_cache() -> None:
    rounds: FederatedTrainer = rounds_of(config("fedper", "mlp"), num_rounds=1)
    tree, kept = (
        rounds.state_dict(),
        dict(rounds.store.committed),
    )
    set_method(rounds, Failing())
    with pytest.raises(Exception, match="no"):
        rounds.run_round()
    rounds.store.commit()
    assert rounds.state_dict()["traffic"] == tree["traffic"]
    assert rounds.store.committed == kept


def test_several_outputs_on_the_same_rows_need_one_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    participant, other, *_ = clients()
    some = torch.arange(5)
    work = [
        (participant, Predict("model", readout="features")),
        (participant, Predict("model")),
        (participant, ClassSums("model", readout="features")),
        # Other rows.
        (participant, Predict("model", Rows("train", rows=some))),
        # Another model.
        (participant, Predict("model", Rows("train", rows=some), tensors=other.models["model"])),
        # Rows of another client.
        (other, Predict("model", Rows("train", rows=some), tensors=other.models["model"])),
    ]
    serial, passes = SerialBackend(DeviceMemory(CPU)), []
    single = [serial.run([one])[0] for one in work]
    module = serial.templates(participant.arch["model"], "model").module
    module.backbone.register_forward_hook(lambda *_: passes.append(1))
    sent = serial.templates(participant.arch["model"], "").module
    sent.backbone.register_forward_hook(lambda *_: passes.append(1))
    together = serial.run(work)
    assert len(passes) == 4
    for a, b in zip(single, together, strict=True):
        assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True))
