"""Attacks: their formulas, the choice of malicious clients, and metrics of benign clients."""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch

import hetero_fl as hfl
from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.prediction import proxy_sample
from hetero_fl.config.population import Population
from hetero_fl.config.protection import ATTACKS, AttacksConfig
from hetero_fl.core.payload import Item, Payload
from hetero_fl.core.plan import Predict, Recalibrate, Rows, TensorRows
from hetero_fl.core.task import Task
from hetero_fl.engine.driver import run_plan
from hetero_fl.experiment import prepare
from hetero_fl.robustness.attacks import (
    TRIGGERED,
    Attack,
    AttackContext,
    MaliciousClients,
    attack,
)
from tests.support.calls import record_calls
from tests.support.cases import each_case
from tests.support.federations import MIXED, config, deployed, rounds_of
from tests.support.python_federations import QUIET

pytestmark = pytest.mark.usefixtures("float64")
TASK = Task("multiclass", 4)


def make_attack(name: str, **settings: Any) -> Attack:
    return attack[name](AttacksConfig(name=name, **settings))


def scene(attackers: int = 3, **more: Any) -> AttackContext:
    return AttackContext(
        TASK,
        0,
        2,
        [f"c{i}" for i in range(attackers)],
        **{"senders": 20, "item": "model", "tensor": "w", **more},
    )


def benign(attackers: int = 3, *shape: int) -> torch.Tensor:
    return torch.randn(attackers, *(shape or (6, 5)), generator=torch.Generator().manual_seed(1))


def test_attack_names_match_the_configuration() -> None:
    assert set(attack) == set(ATTACKS)


def test_update_attacks_match_formulas() -> None:
    u = benign()
    assert torch.equal(make_attack("sign_flip").poison_updates(u, scene()), -4 * u)
    got = make_attack("little_is_enough", strength=1.5).poison_updates(u, scene())
    assert torch.allclose(got, (u.mean(0) - 1.5 * u.var(0, correction=0).sqrt()).expand_as(u))
    assert torch.equal(make_attack("backdoor").poison_updates(u, scene()), u)
    assert torch.equal(make_attack("backdoor", strength=5).poison_updates(u, scene()), 5 * u)


@each_case(("n", "f"), [(20, 4), (50, 12), (11, 2)])
def test_alie_attack_matches_theory(n: int, f: int) -> None:
    z = make_attack("little_is_enough").deviations(n, f)
    supporters = n // 2 + 1 - f
    assert math.erf(z / math.sqrt(2)) / 2 + 0.5 == pytest.approx((n - f - supporters) / (n - f))


def test_noise_attack_is_keyed_and_scaled() -> None:
    u = benign(3, 50, 40)
    one, again = (make_attack("gaussian", strength=10).poison_updates(u, scene()) for _ in range(2))
    assert torch.equal(one, again) and not torch.allclose(one[0], one[1])
    assert not torch.equal(one, make_attack("gaussian").poison_updates(u, scene(tensor="other")))
    assert torch.allclose(
        one.flatten(1).std(1), 10 * u.flatten(1).square().mean(1).sqrt(), rtol=0.1
    )


def test_prediction_attacks_match_formulas() -> None:
    z = benign(3, 8, 4) + 5
    level = z.mean(-1, keepdim=True)
    wrong = make_attack("confident_wrong", strength=1).poison_predictions(z, scene())
    assert (wrong.argmax(-1) != z.argmax(-1)).all() and torch.allclose(
        wrong.sort(-1).values, z.sort(-1).values
    )
    assert not torch.equal(
        wrong[0].argmax(-1) - z[0].argmax(-1), wrong[1].argmax(-1) - z[1].argmax(-1)
    )
    stronger = make_attack("confident_wrong", strength=3).poison_predictions(z, scene())
    assert torch.allclose(stronger - level, 3 * (wrong - level), atol=1e-5)
    forged = make_attack("confident_wrong").poison_predictions(z.softmax(-1), scene())
    assert torch.allclose(forged.sum(-1), torch.ones(3, 8))
    assert torch.equal(make_attack("confident_wrong").poison_updates(z, scene()), z)


def test_label_flip_changes_training_labels() -> None:
    columns = {"x": torch.randn(6, 3), "y": torch.tensor([0, 1, 2, 3, 3, 0])}
    flipped = make_attack("label_flip").poison_rows(columns, scene(1))
    assert flipped["y"].tolist() == [3, 2, 1, 0, 0, 3] and flipped["x"] is columns["x"]
    assert make_attack("label_flip", pairs={0: 2}).poison_rows(columns, scene(1))["y"].tolist() == [
        2,
        1,
        2,
        3,
        3,
        2,
    ]
    many = {"x": columns["x"], "y": torch.tensor([[0.0, 1.0]])}
    other = AttackContext(Task("multilabel", 2), 0, 0, ["c"])
    assert make_attack("label_flip").poison_rows(many, other)["y"].tolist() == [[1, 0]]


def test_backdoor_trigger_covers_its_share_of_rows() -> None:
    x = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    columns = {"x": x.clone(), "y": torch.arange(20) % 4}
    got = make_attack("backdoor", stamped=0.4, target=3, trigger=2).poison_rows(columns, scene(1))
    changed = (got["x"] != x).flatten(1).any(1)
    assert (
        int(changed.sum()) == 8 and (got["y"][changed] == 3).all() and torch.equal(columns["x"], x)
    )
    assert torch.equal(got["y"][~changed], columns["y"][~changed])
    assert (
        torch.equal(got["x"][..., :-2, :], x[..., :-2, :])
        and (got["x"][changed][..., -2:, -2:] == x.max()).all()
    )
    shown = make_attack("backdoor", target=3, trigger=2).triggered_rows(columns, scene(0))
    assert (
        len(shown["y"]) == 15
        and (shown["y"] != 3).all()
        and (shown["x"][..., -2:, -2:] == x.max()).all()
    )


# Malicious clients in a round
def test_malicious_clients_are_sampled_or_named() -> None:
    clients = Population.from_settings(
        {f"c{i}": prepare(config()).federation.client_infos["site_1"].settings for i in range(20)}
    )
    drawn = [
        MaliciousClients.from_config(
            AttacksConfig(name="sign_flip", share=0.3), clients, TASK, seed
        ).sorted_ids
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[0]) == 6
    named = MaliciousClients.from_config(
        AttacksConfig(name="sign_flip", clients=["c3"], from_round=3), clients, TASK, 0
    )
    assert (
        named.sorted_ids == ["c3"]
        and [named.is_malicious("c3", r) for r in (1, 2)] == [False, True]
        and not named.is_malicious("c4", 5)
    )


def lying(method: str, name: str, **changes: Any) -> dict[str, Any]:
    attacks = {"name": name, "clients": ["site_2", "site_4"], **changes}
    return config(
        method, "cnn_bn_small", clients=5, rounds=2, attacks=attacks, data__partition__min_size=20
    )


def sent(
    source: dict[str, Any], monkeypatch: pytest.MonkeyPatch, rounds: int = 1
) -> dict[str, Payload]:
    """Return the uploads of all clients in the last of that many rounds."""
    with monkeypatch.context() as patch:
        added = record_calls(patch, Uploads, "add", lambda _, upload: upload)
        trainer = rounds_of(source, num_rounds=rounds)
    seen = {upload.client: upload.payload for upload in added}
    # In the order of client ids.
    assert list(seen) == [f"site_{i}" for i in range(1, 6)]
    trainer.executor.close()
    return seen


def plain(source: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in source.items() if k != "attacks"}


def equal(a: Item, b: Item) -> bool:
    attacked, benign = (i.values if isinstance(i.values, dict) else {"": i.values} for i in (a, b))
    return all(torch.equal(attacked[n], benign[n]) for n in attacked)


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTACKS)
def test_only_malicious_clients_change_attacked_items(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = lying("hybrid", name)
    attacked, benign = sent(source, monkeypatch), sent(plain(source), monkeypatch)
    for client_id in attacked:
        for item in ("model", "logits"):
            differs = not equal(attacked[client_id].item(item), benign[client_id].item(item))
            acts = name not in ("confident_wrong",) or item == "logits"
            assert differs == (acts and client_id in ("site_2", "site_4")), (client_id, item)
    values, was = attacked["site_2"]["model"], benign["site_2"]["model"]
    buffers = [n for n in values if "running" in n]
    if name in ("sign_flip", "gaussian", "little_is_enough"):
        assert buffers and all(torch.equal(values[n], was[n]) for n in buffers)
        assert attacked["site_2"].item("model").weight == benign["site_2"].item("model").weight


def test_attack_starts_in_its_round_from_received_tensors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = lying("fedavg", "sign_flip", from_round=2, strength=3)
    attacked, benign = sent(source, monkeypatch), sent(plain(source), monkeypatch)
    assert all(
        equal(attacked[client_id].item("model"), benign[client_id].item("model"))
        for client_id in attacked
    )
    before = rounds_of(source, num_rounds=1).server.models
    attacked, benign = sent(source, monkeypatch, 2), sent(plain(source), monkeypatch, 2)
    for n, start in next(iter(before.values())).items():
        if n in attacked["site_4"]["model"] and "running" not in n:
            expected = start - 3 * (benign["site_4"]["model"][n] - start)
            assert torch.allclose(attacked["site_4"]["model"][n], expected, atol=1e-10), n


def test_label_counts_follow_poisoned_labels() -> None:
    source = lying("hybrid", "label_flip")
    federation, other = (prepare(s).federation for s in (source, plain(source)))
    attacker, was = (
        f.client("site_2", rounds_of(source, num_rounds=0).store.get("site_2"), 0)
        for f in (federation, other)
    )
    assert attacker.counts.tolist() == was.counts.flip(0).tolist()
    assert torch.equal(attacker.data("train", None)["y"], 9 - was.data("train", None)["y"])
    for name in ("test", "validation", "common_test"):
        y = attacker.data(name, None)["y"]
        assert y is was.data(name, None)["y"] or torch.equal(y, was.data(name, None)["y"])


def test_metrics_cover_benign_clients_and_backdoor_success() -> None:
    source = lying("fedavg", "backdoor", target=1, trigger=2)
    rounds = rounds_of(source)
    clients = rounds.evaluate().clients
    assert list(clients) == ["site_1", "site_3", "site_5"]
    client = deployed(rounds, "site_1")
    x, y = (client.data("common_test", None)[n] for n in "xy")
    x = x[y != 1].clone()
    x[..., -2:, -2:] = client.data("common_test", None)["x"].max()

    def predict() -> Any:
        return (yield Predict("model", TensorRows({"x": x})))

    logits = run_plan(client, predict(), rounds.backend)[0]
    assert clients["site_1"].triggered == pytest.approx(
        float((logits.argmax(-1) == 1).double().mean())
    )


def test_backdoor_success_without_rows_of_other_classes_is_null() -> None:
    images = np.random.default_rng(0).random((100, 1, 8, 8), dtype=np.float32)
    labels = np.arange(100) % 2
    clients = [hfl.Client(f"site_{i}", "linear", (images, labels)) for i in range(3)]
    test = images[labels == 0], labels[labels == 0]
    attacks = hfl.Attacks(name="backdoor", target=0, clients=["site_0"])

    run = hfl.Federation(clients, test=test).train(
        hfl.FedAvg(), rounds=1, attacks=attacks, overrides=QUIET
    )

    assert run.summary["attacks"]["success"] is None


def test_backdoor_success_uses_recalibrated_models() -> None:
    source = lying("fedavg", "backdoor", target=1, trigger=2)
    source["algorithm"]["recalibrate"] = ["global_test"]
    rounds = rounds_of(source)
    client = deployed(rounds, "site_1")
    step = Recalibrate("model", proxy_sample(client))
    (statistics,) = rounds.backend.run([(client, step)])
    recalibrated = {**client.models["model"], **statistics}

    plain, changed = rounds.backend.run(
        [
            (client, Predict("model", Rows(TRIGGERED), tensors=tensors))
            for tensors in (client.models["model"], recalibrated)
        ]
    )

    rates = [float((z.argmax(-1) == 1).double().mean()) for z in (plain, changed)]
    assert rates[0] != rates[1]
    assert rounds.evaluate().clients["site_1"].triggered == pytest.approx(rates[1])


def test_disabled_attacks_change_nothing() -> None:
    one, other = (
        rounds_of(config("hybrid", MIXED)),
        rounds_of(config("hybrid", MIXED, attacks=None)),
    )
    for group, model in one.server.models.items():
        assert all(torch.equal(t, other.server.models[group][n]) for n, t in model.items())
    assert "attacks" not in one.run_round() and one.evaluate().clients["site_1"].triggered is None


def test_attacks_match_in_batches_and_workers() -> None:
    source = lying("hybrid", "backdoor", strength=2)
    serial, batched = (
        rounds_of({**source, "runtime": {"threads": 1, "executor": name}}, num_rounds=1)
        for name in ("serial", "batched")
    )
    for group, model in serial.server.models.items():
        assert all(
            torch.allclose(t, batched.server.models[group][n], atol=1e-9) for n, t in model.items()
        )
    # As a worker receives it.
    restored = pickle.loads(pickle.dumps(serial.federation.malicious))
    columns = {"x": torch.rand(20, 1, 8, 8), "y": torch.arange(20) % 10}
    own, benign = (
        attackers.poison_data("site_2", lambda name, through: columns, torch.zeros(10), 0)[0](
            "train", None
        )
        for attackers in (serial.federation.malicious, restored)
    )
    assert torch.equal(own["x"], benign["x"]) and not torch.equal(own["x"], columns["x"])
