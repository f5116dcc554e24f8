"""Homomorphic encryption in simulations: results of plain sums, and what the server sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("tenseal", reason="tenseal is not installed: pip install 'hetero_fl[he]'")

from hetero_fl.algorithms import FedAvg, FedMD
from hetero_fl.algorithms.base import broadcasts_means
from hetero_fl.communication.protocol import UPLOAD, Message
from hetero_fl.communication.vector_layout import VectorLayout
from hetero_fl.core.payload import Payload, PayloadError
from hetero_fl.experiment import prepare, run
from hetero_fl.experiment.runner import open_session
from hetero_fl.federation.executors.workers import WorkerSetup
from hetero_fl.federation.trainer import FederatedTrainer
from hetero_fl.utils.errors import RunFailedError, UserError
from tests.federation.test_cost import estimate_and_count
from tests.federation.test_secure_aggregation import failing
from tests.support.calls import record_results
from tests.support.cases import each_case
from tests.support.federations import MIXED, config, rounds_of, same_bits
from tests.support.homomorphic import encrypted, shared_key
from tests.support.summed_runs import largest_difference, received_broadcasts, secure, tensors_of
from tests.support.workers import SharedProcessPool, rounds_on, setup_of, shared_process_pool

MEANS = [
    *("fedavg", "fedavg_ft", "fedprox", "fedlc", "fedbn", "fedper", "fedrep", "fedbabu"),
    *("lg_fedavg", "ditto", "fedmd", "fd", "ds_fl", "fml", "fedproto", "fedmrl"),
]


@pytest.mark.slow
@each_case("changes", [{}, {"clients__per_round": 2, "rounds": 4}])
@pytest.mark.parametrize("method", MEANS)
def test_encrypted_sums_match_plain_sums(
    method: str, changes: dict[str, Any], float64: None
) -> None:
    """Also of clients whose architecture is not in the last sum."""
    plain = rounds_of(config(method, MIXED, 4, **changes))

    assert 0 < largest_difference(plain, rounds_of(encrypted(method, **changes))) < 1e-6


@each_case("method", ["fedavg", "fedmd", "fedproto"])
def test_first_round_matches_plain_sums(method: str, float64: None) -> None:
    plain = rounds_of(config(method, "mlp", 3), num_rounds=1)

    summed = rounds_of(encrypted(method, "mlp", 3), num_rounds=1)

    assert 0 < largest_difference(plain, summed) < 1e-7


def test_secure_aggregation_with_the_same_digits_gives_the_same_bits() -> None:
    digits = {"fraction_bits": 30, "range": 256}
    masked = rounds_of(secure("fedavg", channel__secure_sum=digits))

    summed = rounds_of(encrypted("fedavg", channel__homomorphic=digits))

    assert all(map(torch.equal, tensors_of(masked), tensors_of(summed)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("fedavg", {"clients__overrides": [{"match": "site_[13]", "share_every": 2}], "rounds": 3}),
        ("fedmd", {"algorithm__teacher": "samples", "algorithm__proxy_rows": 20}),
        ("fedavg", {"algorithm__weighting": "uniform", "clients__per_round": 3}),
        ("fedavg", {"runtime": {"executor": "batched", "threads": 1}}),
        ("fedavg", {"faults": {"lost": 0.3}, "cohort": {"too_few": "skip", "least": 2}}),
    ],
)
def test_settings_that_change_sums(method: str, changes: dict[str, Any], float64: None) -> None:
    plain = rounds_of(config(method, MIXED, 4, **changes))

    assert 0 < largest_difference(plain, rounds_of(encrypted(method, **changes))) < 1e-6


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hetero_fl.utils.extras.find_spec", lambda name: None)

    with pytest.raises(UserError, match=r"run pip install 'hetero_fl\[he\]'$"):
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
    record = trainer.run_round()
    key = trainer.executor.runtime.federation.shared_key  # type: ignore[attr-defined]
    models = received_broadcasts(trainer)["site_1"]["model"]

    assert trainer.federation.shared_key is None and record["train_loss"] == {}
    with pytest.raises(PayloadError, match="does not have the shared key"):
        _ = trainer.protocol.key  # type: ignore[attr-defined]
    assert [m.kind for m in seen] == [UPLOAD] * 4
    (last,) = trainer.link.sums.values()  # type: ignore[attr-defined]
    received = b"".join(m.body for m in seen) + last.encode()
    for secret in (key.secret[100:200], key.secret[-100:]):
        assert secret not in received
    assert len(vectors) == 4
    for vector in vectors:
        for form in (vector, vector.astype(np.float32), trainer.protocol.fixed.encode(vector)):  # type: ignore[attr-defined]
            numbers = form[np.flatnonzero(vector)]
            assert not any(numbers[at : at + 4].tobytes() in received for at in range(0, 4000, 40))
    (slot,) = initial
    assert same_bits(trainer.server.models[slot], initial[slot])
    assert not same_bits(models, initial[slot])
    for tensor in models.values():
        if tensor.numel() > 3:
            assert tensor.numpy().tobytes()[:16] not in received


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

    assert largest_difference(*trainers) < 1e-7


def test_out_of_range_values_are_reported() -> None:
    trainer = rounds_of(
        encrypted("fedproto", "mlp", channel__homomorphic={"range": 0.0025}), num_rounds=0
    )

    with pytest.raises(RunFailedError, match=r"channel\.homomorphic\.range: values must be <= 0"):
        trainer.run_round()


@each_case(
    ("report", "values", "message"),
    [
        ({"key": "0" * 32}, torch.clone, "encrypted with another key"),
        ({}, torch.zeros_like, "ciphertext: malformed"),
        ({}, lambda rows: rows[1:], "expected shape"),
        ({}, lambda rows: rows.view(torch.int8), "expected dtype"),
    ],
)
def test_invalid_upload_is_left_out(
    report: dict[str, str],
    values: Callable[[Tensor], Tensor],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer = rounds_of(encrypted("fedavg", "mlp"), num_rounds=0)
    carry_out = trainer.executor.run

    def changed(*arguments: Any) -> Iterator[Any]:
        for arrival in carry_out(*arguments):
            if arrival.client != "site_3":
                yield arrival
                continue
            upload = Payload.decode(arrival.reply.body)
            rows = values(upload["ciphertexts"])
            forged = Payload({"ciphertexts": rows}, upload.report | report)
            yield replace(arrival, reply=Message(UPLOAD, forged.encode()))

    monkeypatch.setattr(trainer.executor, "run", changed)

    record = trainer.run_round()

    assert list(record["failed"]) == ["site_3"] and message in record["failed"]["site_3"]


@each_case(
    ("forged", "message"),
    [
        ({"round": 7}, "unknown round 7"),
        ({"round": "x"}, "unknown round 'x'"),
        ({}, "unknown round None"),
    ],
)
def test_client_refuses_an_invalid_sum(forged: dict[str, Any], message: str) -> None:
    trainer = rounds_of(encrypted("fedavg", "mlp"), num_rounds=1)
    (last,) = trainer.link.sums.values()  # type: ignore[attr-defined]
    last.report = forged

    with pytest.raises(RunFailedError, match=message):
        trainer.run_round()


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
        ("fedavg", {"clients__overrides": [{"match": "site_*", "share_every": 2}]}),
        ("fedproto", {"clients__per_round": 3}),
        ("fedmd", {}),
    ],
)
def test_cost_is_exact(method: str, changes: dict[str, Any], tmp_path: Path) -> None:
    estimated, counted = estimate_and_count(tmp_path, encrypted(method, rounds=4, **changes))

    assert estimated == counted and min(counted) > 0


def test_resumed_run_matches_and_uses_the_same_key(tmp_path: Path) -> None:
    source = encrypted("fedavg", "mlp", rounds=3, evaluation__every=3)
    expected = run(source, out=tmp_path / "whole", quiet=True)
    prepared = prepare(source)
    with open_session(prepared, tmp_path / "parts", quiet=True) as session:
        next(iter(session))
    key = tmp_path / "parts/checkpoint/shared.key"
    secret = key.read_bytes()
    key.rename(tmp_path / "moved.key")
    with pytest.raises(UserError, match=r"shared.key: the key cannot be read .*; restore the file"):
        run(source, out=tmp_path / "parts", resume=True, quiet=True)
    (tmp_path / "moved.key").rename(key)

    resumed = run(source, out=tmp_path / "parts", resume=True, quiet=True)

    assert key.read_bytes() == secret
    assert resumed.summary["global"] == expected.summary["global"]
    assert resumed.summary["communication"] == expected.summary["communication"]
    assert resumed.summary["server"] is None and "server" not in resumed.models
    for client in expected.models:
        one, two = (r.model(client).state_dict() for r in (expected, resumed))
        assert same_bits(one, two)


def keyed(setup: WorkerSetup) -> WorkerSetup:
    return replace(setup, federation=replace(setup.federation, shared_key=shared_key()))


@pytest.fixture(scope="module")
def pool() -> Iterator[SharedProcessPool]:
    with shared_process_pool(setup_of("local"), 2) as pool:
        yield pool


@pytest.mark.slow
@each_case("method", ["fedmd", "ditto"])
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


def test_methods_with_their_own_aggregation_declare_that_they_send_means() -> None:
    hooks = {"aggregate": lambda self, server, uploads: ()}

    other = type("Other", (FedAvg,), hooks)
    declared = type("Declared", (FedAvg,), {**hooks, "_broadcasts_means": True})
    inherited = type("Inherited", (declared,), {})
    same = type("Same", (FedAvg,), {})
    teacher = type("Teacher", (FedMD,), {"teacher_from_mean": lambda self, s, u, mean: mean})

    found = [broadcasts_means(method()) for method in (other, declared, inherited, same, teacher)]
    assert found == [False, True, True, True, False]
    assert not broadcasts_means(same(server_lr=0.5)) and not broadcasts_means(FedMD(align=0.5))
