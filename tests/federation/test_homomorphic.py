"""Homomorphic encryption in simulations: results of plain sums, and what the server sees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

pytest.importorskip("tenseal", reason="tenseal is not installed: pip install 'hetero_fl[privacy]'")

from hetero_fl.communication.homomorphic.key import SharedKey
from hetero_fl.communication.homomorphic.messages import SEALED, unseal_state
from hetero_fl.communication.protocol import Message
from hetero_fl.communication.vector_layout import VectorLayout
from hetero_fl.core.payload import PayloadError
from hetero_fl.engine.driver import DivergedError
from hetero_fl.experiment import prepare, run
from hetero_fl.experiment.runner import open_session
from hetero_fl.federation.executors.worker import WorkerSetup
from hetero_fl.federation.summed_uploads import hidden_server
from hetero_fl.federation.trainer import FederatedTrainer
from hetero_fl.utils.errors import RunFailedError, UserError
from tests.federation.test_cost import estimate_and_count
from tests.federation.test_secure_aggregation import failing
from tests.support.calls import record_results
from tests.support.cases import each_case
from tests.support.federations import MIXED, SUMMING, config, rounds_of, same_bits
from tests.support.homomorphic import encrypted, shared_key, unsealed_server
from tests.support.summed_runs import largest_difference, secure, tensors_of
from tests.support.workers import SharedProcessPool, rounds_on, setup_of, shared_process_pool


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in SUMMING if name != "local"])
def test_encrypted_sums_match_plain_sums(method: str, float64: None) -> None:
    plain, summed = rounds_of(config(method, MIXED, 4)), rounds_of(encrypted(method))

    assert 0 < largest_difference(plain, summed) < 1e-6


@each_case("method", ["fedavg", "fedmd", "fedproto"])
def test_first_round_matches_plain_sums(method: str, float64: None) -> None:
    plain = rounds_of(config(method, "mlp", 3), num_rounds=1)

    summed = rounds_of(encrypted(method, "mlp", 3), num_rounds=1)

    assert 0 < largest_difference(plain, summed) < (1e-8 if method != "fedproto" else 1e-7)


def test_small_weights_lose_no_digits() -> None:
    protocol = rounds_of(encrypted("hybrid"), num_rounds=0).protocol

    layout = protocol.agreed.layout(0)  # type: ignore[attr-defined]

    assert layout.unit_weights == {"logits"}


def test_secure_aggregation_with_the_same_digits_gives_the_same_bits() -> None:
    digits = {"fraction_bits": 30, "range": 256}
    masked = rounds_of(secure("fedavg", channel__secure_sum=digits))

    summed = rounds_of(encrypted("fedavg", channel__homomorphic=digits))

    assert all(map(torch.equal, tensors_of(masked), tensors_of(summed)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("hybrid", {"clients__overrides": [{"match": "site_[13]", "share_every": 2}], "rounds": 3}),
        ("fedmd", {"algorithm__teacher": "samples"}),
        ("fedavg", {"algorithm__weighting": "sum", "clients__per_round": 3}),
        ("heterofl", {"algorithm__masked": True}),
        ("hybrid", {"runtime": {"executor": "batched", "threads": 1}}),
        ("fedavg", {"faults": {"lost": 0.3}, "cohort": {"too_few": "skip", "least": 2}}),
    ],
)
def test_settings_that_change_sums(method: str, changes: dict[str, Any], float64: None) -> None:
    plain = rounds_of(config(method, MIXED, 4, **changes))

    assert 0 < largest_difference(plain, rounds_of(encrypted(method, **changes))) < 1e-6


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hetero_fl.utils.extras.find_spec", lambda name: None)

    with pytest.raises(UserError, match=r"run pip install 'hetero_fl\[privacy\]'$"):
        prepare(encrypted("fedavg"))


def recorded_bytes(trainer: FederatedTrainer, monkeypatch: pytest.MonkeyPatch) -> list[Message]:
    """Record all replies that the server receives."""
    seen: list[Message] = []
    carry_out = trainer.executor.run

    def watched(*arguments: Any) -> Iterator[Any]:
        for arrival in carry_out(*arguments):
            if isinstance(arrival.reply, Message):
                seen.append(arrival.reply)
            yield arrival

    monkeypatch.setattr(trainer.executor, "run", watched)
    return seen


def test_server_has_neither_key_nor_models(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = rounds_of(encrypted("fedavg", "mlp"), num_rounds=0)
    initial = {k: dict(v) for k, v in trainer.server.models.items()}
    seen = recorded_bytes(trainer, monkeypatch)
    vectors = record_results(monkeypatch, VectorLayout, "pack")
    trainer.run_round()
    key = trainer.executor.runtime.federation.shared_key  # type: ignore[attr-defined]
    server = unsealed_server(trainer)

    assert trainer.federation.shared_key is None
    with pytest.raises(PayloadError, match="does not have the shared key"):
        _ = trainer.protocol.key  # type: ignore[attr-defined]
    assert [m.kind for m in seen] == ["train"] * 4 + ["aggregate"]
    received = b"".join(m.body for m in seen) + trainer.link.state  # type: ignore[attr-defined]
    for secret in (key.seal, key.secret[100:200], key.secret[-100:]):
        assert secret not in received
    assert len(vectors) == 4
    for vector in vectors:
        for form in (vector, vector.astype(np.float32), trainer.protocol.fixed.encode(vector)):  # type: ignore[attr-defined]
            numbers = form[np.flatnonzero(vector)]
            assert not any(numbers[at : at + 4].tobytes() in received for at in range(0, 4000, 40))
    for slot, tensors_of_slot in server.models.items():
        assert same_bits(trainer.server.models[slot], initial[slot])
        assert not same_bits(tensors_of_slot, initial[slot])
        for tensor in tensors_of_slot.values():
            if tensor.numel() > 3:
                assert tensor.numpy().tobytes()[:16] not in received
    assert trainer.link.state[:1] == SEALED  # type: ignore[attr-defined]
    with pytest.raises(PayloadError, match="cannot be decrypted"):
        unseal_state(trainer.link.state, SharedKey.generate())  # type: ignore[attr-defined]


def test_evaluation_uses_decrypted_models() -> None:
    plain = rounds_of(config("fedavg", "mlp", 3)).evaluate()

    summed = rounds_of(encrypted("fedavg", "mlp", 3)).evaluate()

    assert plain.server is not None and summed.server is None
    for client, evaluation in plain.clients.items():
        scores = summed.clients[client].scores["global"]
        assert scores["loss"] == pytest.approx(evaluation.scores["global"]["loss"], rel=1e-4)


def test_dropout_costs_only_its_summand(monkeypatch: pytest.MonkeyPatch, float64: None) -> None:
    trainers = [rounds_of(c("fedproto", "mlp", 4), num_rounds=0) for c in (config, encrypted)]
    for trainer in trainers:
        failing(trainer, ["site_1"], monkeypatch)
        assert trainer.run_round()["failed"] == {"site_1": "its loss is nan"}
        monkeypatch.undo()

    assert largest_difference(*trainers) < 1e-8


def test_next_client_decrypts_if_one_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = rounds_of(encrypted("fedavg", "mlp"), num_rounds=0)
    decrypt = hidden_server.HiddenServer.aggregate
    asked = []

    def flaky(self: Any, *arguments: Any) -> Any:
        asked.append(1)
        if len(asked) < 3:
            raise PayloadError("no memory left")
        return decrypt(self, *arguments)

    monkeypatch.setattr(hidden_server.HiddenServer, "aggregate", flaky)

    record = trainer.run_round()

    assert len(asked) == 3 and record["failed"] == {}
    assert record["train_loss"] == {}
    assert trainer.link.state  # type: ignore[attr-defined]


def test_failed_aggregation_keeps_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = rounds_of(encrypted("fedavg", "mlp", rounds=5), num_rounds=1)
    before = trainer.link.state  # type: ignore[attr-defined]

    failing_sum = Mock(side_effect=DivergedError("its loss is nan"))
    monkeypatch.setattr(hidden_server.HiddenServer, "aggregate", failing_sum)
    record = trainer.run_round()

    assert record["skipped"] and "its loss is nan" in record["diverged"]
    assert trainer.link.state == before  # type: ignore[attr-defined]

    failing_sum.side_effect = PayloadError("no memory left")
    with pytest.raises(
        RunFailedError,
        match=r"round 3: none of 4 clients decrypted the sum \(site_\d: .*no memory left\)",
    ):
        trainer.run_round()
    assert trainer.link.state == before  # type: ignore[attr-defined]


def test_out_of_range_values_are_reported() -> None:
    trainer = rounds_of(
        encrypted("fedproto", "mlp", channel__homomorphic={"range": 0.25}), num_rounds=0
    )

    with pytest.raises(RunFailedError, match=r"channel\.homomorphic\.range: values must be <= 0"):
        trainer.run_round()


def test_client_with_another_key_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = rounds_of(encrypted("fedavg", "mlp"), num_rounds=0)
    protocol = trainer.executor.runtime.protocol  # type: ignore[attr-defined]
    answer = protocol.answer
    keys = [protocol.key, SharedKey.generate()]

    def answer_with(client_id: str, *arguments: Any) -> Any:
        protocol._key = keys[client_id == "site_3"]
        return answer(client_id, *arguments)

    monkeypatch.setattr(protocol, "answer", answer_with)
    send = trainer.executor.runtime._send  # type: ignore[attr-defined]

    def send_with(client: Any, *arguments: Any) -> Any:
        protocol._key = keys[client.participant_id == "site_3"]
        return send(client, *arguments)

    monkeypatch.setattr(trainer.executor.runtime, "_send", send_with)  # type: ignore[attr-defined]

    record = trainer.run_round()

    assert list(record["failed"]) == ["site_3"]
    assert "encrypted with another key" in record["failed"]["site_3"]


@each_case("unit", ["record", "local"])
def test_noise_of_clients_is_allowed(unit: str) -> None:
    privacy = {"unit": unit, "noise_multiplier": 1.0, "clip": 1.0}
    groups = {"models": {"name": "cnn", "width": 4, "norm": "group"}, "privacy": privacy}
    plain = rounds_of(config("fedavg", clients=3, **groups), num_rounds=1)

    summed = rounds_of(encrypted("fedavg", clients=3, **groups), num_rounds=1)

    assert largest_difference(plain, summed) < 1e-6


@pytest.mark.slow
@each_case(
    ("method", "changes"),
    [
        ("hybrid", {"clients__overrides": [{"match": "site_[12]", "share_every": 3}]}),
        ("fedproto", {"clients__per_round": 3}),
        ("fedadam", {}),
    ],
)
def test_cost_is_exact(method: str, changes: dict[str, Any], tmp_path: Path) -> None:
    estimated, counted = estimate_and_count(tmp_path, encrypted(method, rounds=4, **changes))

    assert estimated == counted and min(counted) > 0


def test_resumed_run_matches_and_uses_the_same_key(tmp_path: Path) -> None:
    source = encrypted("fedadam", "mlp", rounds=3, evaluation__every=3)
    expected = run(source, out=tmp_path / "whole", quiet=True)
    prepared = prepare(source)
    with open_session(prepared, tmp_path / "parts", quiet=True) as session:
        next(iter(session))
    key = (tmp_path / "parts/checkpoint/shared.key").read_bytes()

    resumed = run(source, out=tmp_path / "parts", resume=True, quiet=True)

    assert (tmp_path / "parts/checkpoint/shared.key").read_bytes() == key
    assert resumed.summary["global"] == expected.summary["global"]
    assert resumed.summary["communication"] == expected.summary["communication"]
    assert resumed.summary["server"] is None and "server" not in resumed.models
    for client in expected.models:
        one, two = (r.model(client).state_dict() for r in (expected, resumed))
        assert same_bits(one, two)


def test_resuming_without_the_key_names_the_file(tmp_path: Path) -> None:
    source = encrypted("fedavg", "mlp", rounds=3, evaluation__every=3)
    with open_session(prepare(source), tmp_path, quiet=True) as session:
        next(iter(session))
    (tmp_path / "checkpoint/shared.key").unlink()

    with pytest.raises(UserError, match=r"checkpoint/shared.key: not found; .*restore the file"):
        run(source, out=tmp_path, resume=True, quiet=True)

    assert not (tmp_path / "checkpoint/shared.key").exists()


def keyed(setup: WorkerSetup) -> WorkerSetup:
    return replace(setup, federation=replace(setup.federation, shared_key=shared_key()))


@pytest.fixture(scope="module")
def pool() -> Iterator[SharedProcessPool]:
    with shared_process_pool(setup_of("local"), 2) as pool:
        yield pool


@pytest.mark.slow
@each_case("method", ["hybrid", "ditto", "scaffold"])
def test_workers_match_one_process(method: str, pool: SharedProcessPool) -> None:
    setup = keyed(setup_of(encrypted(method, rounds=3, clients__per_round=3)))
    expected = rounds_on(setup, None)
    records = [expected.run_round(), expected.run_round()]
    assert not any(record["failed"] for record in records)
    pool.take(setup)

    for size in (1, 2):
        trainer = rounds_on(setup, pool, size)
        for record in records:
            assert trainer.run_round()["train_loss"] == record["train_loss"]
        states = tensors_of(expected, shared_key()), tensors_of(trainer, shared_key())
        assert all(map(torch.equal, *states))
