"""Synchronous rounds: client state, refused uploads, evaluation, and the code that they call."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map

import hetero_fl
from hetero_fl.aggregation import Uploads
from hetero_fl.algorithms import Hybrid, local_fit
from hetero_fl.core.participant import ClientInfo, Participant, copy_tree
from hetero_fl.core.payload import Payload
from hetero_fl.core.plan import Fit, Plan
from hetero_fl.engine.driver import DivergedError
from hetero_fl.experiment import prepare
from hetero_fl.federation.trainer import FederatedTrainer
from hetero_fl.reporting.summary import Patience
from hetero_fl.utils.errors import RunFailedError, UserError
from hetero_fl.utils.ordering import natural_order
from hetero_fl.utils.serialization import decode, encode
from tests.support.calls import record_calls, record_results
from tests.support.cases import each_case
from tests.support.federations import (
    MIXED,
    change_method,
    config,
    deployed,
    poison_upload,
    rounds_of,
    same_bits,
)


def test_evaluation_and_training_deploy_the_same_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that deploying twice is bit-identical and does not digest twice."""
    algorithm = {"name": "hybrid", "distill_at": "both"}
    rounds = rounds_of(config("hybrid", MIXED, algorithm=algorithm), num_rounds=1)
    read = deployed(rounds, "site_1").models["model"]
    found = record_calls(
        monkeypatch, Hybrid, "proxy_replay", lambda _, client, *rest: client.models["model"]
    )
    rounds.run_round()
    assert same_bits(found[0], read)


@each_case("method", ["fedavg", "fedper"])
def test_nan_upload_is_refused_and_state_is_unchanged(
    method: str,
) -> None:
    rounds = rounds_of(config(method, rounds=3), num_rounds=1)
    before = rounds.store.get("site_1").models
    poison_upload(rounds, "site_1", 1, "model")
    record = rounds.run_round()
    assert list(record["failed"]) == ["site_1"] and "not finite" in record["failed"]["site_1"]
    assert (
        rounds.store.get("site_1").models is before or rounds.store.get("site_1").models == before
    )
    assert rounds.run_round()["failed"] == {}


def test_diverging_client_is_dropped_and_empty_round_fails() -> None:
    groups = [
        {"name": "calm", "count": 2, "model": "mlp"},
        {"name": "wild", "model": "mlp", "optimizer": {"lr": 1e30}},
    ]
    rounds = rounds_of(config("fedavg", clients__groups=groups), num_rounds=0)
    record = rounds.run_round()
    assert list(record["failed"]) == ["wild"] and "finite" in record["failed"]["wild"]
    assert all(torch.isfinite(t).all() for m in rounds.server.models.values() for t in m.values())
    wild = rounds_of(
        config("fedavg", "mlp", clients__defaults={"optimizer": {"lr": 1e30}}), num_rounds=0
    )
    with pytest.raises(RunFailedError, match="no usable upload"):
        wild.run_round()


def diverging(
    rounds: FederatedTrainer, turns: Collection[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let server training diverge at these turns (from 0), after it changed all state."""
    aggregate, turn = type(rounds.algorithm).aggregate, itertools.count()

    def aggregates(method: Any, server: Participant, uploads: Uploads) -> Plan[None]:
        yield from aggregate(method, server, uploads)
        if next(turn) in turns:
            server.models = {slot: {} for slot in server.models}
            for each in server.state.values():
                if isinstance(each, dict):
                    each.clear()
            server.state["more"], server.arch = 1, {}
            raise DivergedError("loss or parameters of 'student' are not finite (mean loss inf)")

    monkeypatch.setattr(type(rounds.algorithm), "aggregate", aggregates)


@each_case("method", ["fedavgm", "scaffold", "feddf", "fedkd", "fedbuff"])
def test_diverging_server_training_changes_nothing(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = {"algorithm__buffer": 3} if method == "fedbuff" else {}
    rounds = rounds_of(config(method, rounds=4, **buffer), num_rounds=1)
    loud(rounds, "site_2", monkeypatch)
    before = copy_tree([rounds.server.models, rounds.server.state])
    diverging(rounds, [0], monkeypatch)

    record = rounds.run_round()

    assert encode([rounds.server.models, rounds.server.state], "x") == encode(before, "x")
    assert record["diverged"].startswith(
        "training at the server diverged: loss or parameters of 'student' "
        "are not finite (mean loss inf)"
    )
    assert "the upload of site_2 has the largest magnitude, " in record["diverged"]
    assert method == "fedbuff" or record["skipped"]
    assert "diverged" not in rounds.run_round() and rounds.num_diverged == 0


def loud(rounds: FederatedTrainer, client: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiply the uploads of a client by a thousand."""
    uploaded = rounds.link.decode_upload

    def louder(client_info: ClientInfo, *args: Any) -> Payload:
        payload = uploaded(client_info, *args)
        return (
            Payload.decode(scaled(payload).encode()) if client_info.client_id == client else payload
        )

    monkeypatch.setattr(rounds.link, "decode_upload", louder)


def scaled(payload: Payload) -> Payload:
    items = {
        name: replace(item, values=tree_map(lambda t: t * 1000, item.values))
        for name, item in payload.items_by_name.items()
    }
    return Payload(items, payload.report)


@each_case("method", ["fedavg", "fedbuff"])
def test_repeated_server_divergence_fails_in_one_line(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = {"algorithm__buffer": 3} if method == "fedbuff" else {}
    rounds = rounds_of(config(method, rounds=9, **buffer), num_rounds=0)
    diverging(rounds, [0, 1, 3, 4, 5], monkeypatch)

    while rounds.completed < 5:
        rounds.run_round()
    with pytest.raises(
        RunFailedError,
        match=r"round 6: .*diverged.*the largest magnitude, .*, 3 times in a row$",
    ):
        rounds.run_round()


def test_server_divergence_is_counted_across_checkpoints(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_config = config("fedavg", rounds=9)
    rounds = rounds_of(run_config, num_rounds=0)
    diverging(rounds, [0, 1, 2], monkeypatch)
    rounds.run_round()
    rounds.run_round()
    later = rounds_of(run_config, num_rounds=0)
    later.load_state_dict(decode(encode(rounds.state_dict(), "x"), "x"))

    with pytest.raises(RunFailedError, match="3 times in a row"):
        later.run_round()


@each_case("stop", [{"rounds": 1}, {"rounds": 9, "runtime__divergence": "stop"}])
def test_server_divergence_ends_a_run_of_one_round(stop: dict[str, Any]) -> None:
    rounds = rounds_of(
        config("feddf", server={"optimizer": {"name": "sgd", "lr": 1e30}}, **stop), num_rounds=0
    )

    with pytest.raises(RunFailedError, match="at the server diverged"):
        rounds.run_round()


def test_server_has_only_trained_models() -> None:
    assert rounds_of(config("fedavg"), num_rounds=1).evaluate().server is not None
    assert rounds_of(config("fedavg", MIXED[:2], clients=4), num_rounds=1).evaluate().server is None
    backbone = {"shares": ["backbone"], "optimizer": {"name": "sgd", "lr": 0.05}}
    assert (
        rounds_of(config("fedavg", clients__defaults=backbone), num_rounds=1).evaluate().server
        is None
    )
    # No predictions from which to distill a student.
    for method in ("fedavg", "local", "fd"):
        rounds = rounds_of(
            config(method, MIXED[:2], clients=4, server={"model": "mlp"}), num_rounds=1
        )
        assert "student" not in rounds.server.models and rounds.evaluate().server is None
    assert (
        rounds_of(config("fedmd", MIXED, server={"model": "mlp"}), num_rounds=1).evaluate().server
        is not None
    )


def test_heads_stay_local_if_configured() -> None:
    rounds = rounds_of(config("fedper"))
    kept = [
        rounds.store.get(client_id).models["model"] for client_id in rounds.federation.client_infos
    ]
    assert all(n.startswith("head.") or "num_batches" in n for k in kept for n in k)
    assert not torch.equal(kept[0]["head.weight"], kept[1]["head.weight"])
    # A client without private state takes no memory.
    assert rounds_of(config("fedavg")).store.clients() == []


def test_sharing_interval_of_two_rounds() -> None:
    rounds = rounds_of(config("fedavg", clients__defaults={"share_every": 2}), num_rounds=0)
    (group,) = rounds.server.models
    start = dict(rounds.server.models[group])
    rounds.run_round()
    assert same_bits(start, rounds.server.models[group])
    assert all(
        "backbone.0.weight" in rounds.store.get(client_id).models["model"]
        for client_id in rounds.federation.client_infos
    )
    rounds.run_round()
    assert not same_bits(start, rounds.server.models[group])
    with pytest.raises(UserError, match=r"share_every.*per_round"):
        prepare(config("fedavg", clients__defaults={"share_every": 2}, clients__per_round=2))


def test_label_counts_stay_local_without_shared_statistics(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shares = {"shares": ["parameters", "predictions"], "optimizer": {"name": "sgd", "lr": 0.05}}
    algorithm = {"name": "fedmd", "teacher": "contrast"}
    source = config("fedmd", algorithm=algorithm, clients__defaults=shares)
    rounds = rounds_of(source, num_rounds=0)
    seen = record_results(monkeypatch, rounds.link, "decode_upload")
    rounds.run_round()
    for payload in seen:
        weight = payload.item("logits").weight
        # Contains the number of clients, not their names.
        assert isinstance(weight, torch.Tensor) and torch.allclose(weight, weight[:1].expand(10))


def test_private_state_is_not_changed_in_place() -> None:
    rounds = rounds_of(config("local"), num_rounds=1)
    private = rounds.store.get("site_1")
    private.state |= {"nested": {"a": [1]}, "seen": torch.zeros(2)}

    client = rounds.federation.client("site_1", private, 1)
    client.state["nested"]["a"].append(2)
    client.state["seen"].add_(1)

    assert private.state["nested"] == {"a": [1]}
    assert private.state["seen"].tolist() == [0, 0]


@each_case("setting", [{"class_weights": "balanced"}, {"augment": {"flip": True, "crop": 1}}])
def test_centralized_training_uses_client_settings(setting: dict[str, Any]) -> None:
    defaults = {"optimizer": {"name": "sgd", "lr": 0.05}, **setting}
    fedavg = rounds_of(config("fedavg", clients=1, clients__defaults=defaults))
    pooled = rounds_of(config("centralized", clients=1, clients__defaults=defaults))
    without = rounds_of(
        config(
            "centralized", clients=1, clients__defaults={"optimizer": {"name": "sgd", "lr": 0.05}}
        )
    )
    (group,) = fedavg.server.models
    weights = [r.server.models[group]["backbone.0.weight"] for r in (fedavg, pooled, without)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])


def test_patience_counts_the_same_after_a_resume() -> None:
    task = rounds_of(config("local"), num_rounds=0).federation.task
    scores = [0.5, 0.6, 0.6, 0.55, 0.6]
    history = [
        {"round": i + 1, "validation": {"personal": None, "global": {"balanced_accuracy": s}}}
        for i, s in enumerate(scores)
    ]
    straight, resumed = Patience(task, 3, []), Patience(task, 3, history[:3])
    for record in history:
        straight.update(record)
    for record in history[3:]:
        resumed.update(record)
    assert straight.exhausted and resumed.exhausted and not Patience(task, 3, history[:4]).exhausted


def test_head_and_backbone_can_have_separate_learning_rates() -> None:
    rounds = rounds_of(
        config(
            "local", clients__defaults={"optimizer": {"name": "sgd", "lr": 0.1, "head_lr": 1e-12}}
        ),
        num_rounds=1,
    )
    kept, start = (
        rounds.store.get("site_1").models["model"],
        rounds.federation.initial_tensors(rounds.federation.client_infos["site_1"].arch),
    )
    assert torch.allclose(kept["head.weight"], start["head.weight"], atol=1e-8)
    assert not torch.allclose(kept["backbone.0.weight"], start["backbone.0.weight"], atol=1e-4)


def test_persistent_optimizer_continues_from_its_state() -> None:
    rounds = rounds_of(
        config("local", clients__defaults={"optimizer": {"name": "adam", "lr": 0.01}}), num_rounds=0
    )
    ends = []
    for keep in (None, "mine"):
        client = rounds.federation.client("site_1", rounds.store.get("site_1"), 0)
        fit = local_fit(client)
        for _ in range(2):
            rounds.backend.run([(client, Fit(**{**fit.__dict__, "keep": keep}))])
        ends.append(client.models["model"]["head.weight"])
        if keep:
            steps = {float(s["step"]) for s in client.state["optimizers"]["mine"].values()}
            assert steps == {2.0 * -(-client.num_rows // 16)} or len(steps) == 1
    assert not torch.equal(*ends)


def test_hook_without_steps_may_be_a_plain_function() -> None:
    rounds = rounds_of(config("fedavg"), num_rounds=0)
    aggregated: list[int] = []
    change_method(rounds, aggregate=lambda self, server, uploads: aggregated.append(len(uploads)))

    rounds.run_round()

    assert aggregated == [len(rounds.federation.client_infos)]


def test_cohort_depends_on_the_round() -> None:
    federation = prepare(config("fedavg", clients=8)).federation

    cohorts = [federation.sample_cohort(3, round_idx) for round_idx in range(8)]

    assert len({tuple(cohort) for cohort in cohorts}) > 4
    assert all(len(set(c)) == 3 and c == natural_order(c) for c in cohorts)
    assert cohorts[0] == federation.sample_cohort(3, 0)


PACKAGE = Path(hetero_fl.__file__).parent


OPTIONAL = (
    "privacy/",
    "robustness/",
    "communication/compression.py",
    "communication/compressor.py",
    "communication/secure_aggregation/",
    "federation/simulation/",
    "federation/asynchronous.py",
    "deployment/",
)


def entered_modules(source: dict[str, Any]) -> set[str]:
    """Return the modules of the package that the second round of a run calls."""
    trainer = rounds_of(source, num_rounds=1)
    entered: set[str] = set()

    def trace(frame: FrameType, event: str, _: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            entered.add(path.relative_to(PACKAGE).as_posix())

    sys.setprofile(trace)
    try:
        trainer.run_round()
    finally:
        sys.setprofile(None)
    return entered


@each_case("method", ["fedavg", "fedmd", "hybrid"])
def test_plain_round_calls_no_optional_feature(method: str) -> None:
    entered = entered_modules(config(method, rounds=2))

    assert "federation/round.py" in entered
    assert not [module for module in entered if module.startswith(OPTIONAL)]


@each_case(
    ("section", "module"),
    [
        (
            {"privacy": {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-4}},
            "privacy/server_side.py",
        ),
        (
            {"aggregation": {"rule": "median", "malicious": 1}},
            "aggregation/robust_means.py",
        ),
        ({"channel": {"secure_sum": {}}}, "communication/secure_aggregation/protocol.py"),
        ({"channel": {"compress": [{"topk": 0.1}]}}, "communication/compression.py"),
        ({"devices": {"speed": 100.0}}, "federation/simulation/executor.py"),
    ],
)
def test_enabled_feature_is_called(section: dict[str, Any], module: str) -> None:
    source = config("fedavg", {"name": "mlp", "hidden": [8]}, 4, rounds=2, **section)

    assert module in entered_modules(source)
