"""Methods that exchange class statistics: FD, FedProto, FedTGP and FedGH."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from hetero_fl.algorithms.prototypes import largest_center_distance, prototype_logits
from hetero_fl.core.generative_objectives import AdaptiveMargin
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.core.objectives import Batch, ModelView, ModelViews
from hetero_fl.experiment import prepare, run
from hetero_fl.experiment.configuration import load_config
from model_zoo import SplitModel
from tests.support.calls import record_results
from tests.support.federations import MIXED, config, deployed, rounds_of, same_bits

WIDE = [
    {"name": "cnn_bn_small", "feature_dim": 24},
    {"name": "mlp", "hidden": [24]},
    {"name": "cnn", "width": 4, "norm": "group", "feature_dim": 24},
]


def test_prediction_ignores_classes_without_prototype() -> None:
    g = torch.Generator().manual_seed(1)
    features, prototypes = torch.randn(50, 6, generator=g), torch.randn(4, 6, generator=g)
    known = torch.tensor([1.0, 0.0, 1.0, 1.0])
    # The nearest of all if it were not excluded.
    prototypes[1] = features[0]
    logits = prototype_logits(features, prototypes, known)
    for f, z in zip(features, logits, strict=True):
        far = [float((f - p).square().sum().sqrt()) for p in prototypes]
        assert torch.allclose(z[known > 0], -torch.tensor(far)[known > 0], atol=1e-5)
        assert int(z.argmax()) == min((0, 2, 3), key=lambda c: far[c])
    assert logits.isfinite().all() and float(logits.softmax(-1)[:, 1].max()) < 1e-8


def test_head_predicts_before_the_first_aggregation() -> None:
    rounds = rounds_of(config("fedproto"), num_rounds=0)
    client = deployed(rounds, "site_1")
    columns = client.data("common_test", None)
    with torch.no_grad():
        model = client.arch["model"].build()
        model.load_state_dict(client.models["model"])
        expected = F.cross_entropy(model.eval()(columns["x"]), columns["y"])

    found = rounds.evaluate().clients["site_1"].scores["global"]["loss"]

    assert found == pytest.approx(expected.item(), abs=1e-5)


def test_unsent_class_keeps_its_prototype() -> None:
    rounds = rounds_of(config("fedproto", clients=6, clients__per_round=1, rounds=1))
    state = {n: t.clone() for n, t in rounds.server.state.items()}
    assert 0 < state["known"].sum() < 10
    for _ in range(3):
        rounds.run_round()
        assert (rounds.server.state["known"] >= state["known"]).all()
    (sent,) = rounds.sample_cohort(rounds.completed - 1)
    untouched = (rounds.federation.label_counts(sent) == 0) & (rounds.server.state["known"] > 0)
    assert untouched.any() and rounds.server.state["prototypes"][untouched].abs().sum() > 0


@pytest.mark.parametrize("method", ["fd", "fedproto", "fedtgp", "fedgh"])
def test_clients_without_shared_statistics_send_nothing(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = config(method, MIXED)
    source["clients"]["overrides"] = [{"match": "site_2", "shares": ["parameters", "predictions"]}]
    rounds = rounds_of(source, num_rounds=0)
    received = record_results(monkeypatch, rounds.link, "decode_upload")

    rounds.run_round()

    item = "class_logits" if method == "fd" else "features"
    # In the order of clients.
    assert [list(payload) for payload in received] == [[item], [], [item]]


@pytest.mark.parametrize("method", ["fd", "fedproto", "fedtgp", "fedgh"])
def test_clients_that_have_shared_nothing_yet_train_alone(method: str) -> None:
    later = {"share_every": 9, "optimizer": {"name": "sgd", "lr": 0.05}}
    single, local = (
        rounds_of(config(name, WIDE, clients__defaults=later)) for name in (method, "local")
    )

    for client_id in local.federation.client_infos:
        expected = local.store.get(client_id).models["model"]
        assert same_bits(single.store.get(client_id).models["model"], expected)


def test_fedgh_sends_head_at_sharing_interval() -> None:
    source = config("fedgh", MIXED, rounds=5, clients__defaults__share_every=2)
    rounds, sent = rounds_of(source, num_rounds=0), []
    info = rounds.federation.client_infos["site_1"]
    for index in range(5):
        rounds.set_round(index)
        sent.append(list(rounds.algorithm.broadcast(rounds.server, info)))
        rounds.run_round()

    assert sent == [[], [], ["head"], [], ["head"]]


def test_class_centers_weight_clients_with_the_class_equally() -> None:
    means = torch.tensor([[[0.0, 0], [4, 0], [9, 9]], [[2.0, 0], [99, 99], [9, 9]]])
    has = torch.tensor([[True, True, False], [True, False, False]])
    # Centers (1, 0) and (4, 0).
    assert float(largest_center_distance(means, has)) == 3.0
    assert float(largest_center_distance(means, has & False)) == 0.0


def test_margin_loss_has_finite_gradients_and_stacks() -> None:
    torch.manual_seed(1)
    linear: SplitModel = ModelSpec.from_config("linear", 4, (3,)).build()
    mlp: SplitModel = ModelSpec.from_config("mlp", 4, (4,), options={"hidden": [4]}).build()
    nets = ModelViews(vectors=ModelView.from_module(linear), prototypes=ModelView.from_module(mlp))
    given = {"one_hot": torch.eye(3), "margin": torch.tensor(2.0)}
    # Every prototype is at its target.
    x = mlp(linear(torch.eye(3))).detach()
    objective, y = AdaptiveMargin(), torch.arange(3)
    loss = objective.total_loss(nets, Batch(x=x, y=y), given)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mlp.parameters())
    both = torch.vmap(lambda x: objective.total_loss(nets, Batch(x=x, y=y), given))(
        torch.stack([x + 1, x])
    )
    assert torch.allclose(both[1], loss, atol=1e-6)


@pytest.mark.slow
def test_common_width_is_the_most_frequent_and_recorded(tmp_path: Path) -> None:
    models = ["cnn_bn_small", {"name": "mlp", "hidden": [24]}, {"name": "mlp", "hidden": [24, 32]}]
    source = config("fedproto", models, rounds=1)
    for chosen, width, projected in (
        (source, 32, [None, 32, None]),
        (config("fedproto", models[:2], clients=2), 32, [None, 32]),
        (config("fedproto", models, algorithm__feature_dim=8), 8, [8, 8, 8]),
    ):
        prepared = prepare(chosen)
        archs = [info.arch for info in prepared.federation.client_infos.values()]
        assert [arch.feature_width for arch in archs] == [width] * len(archs)
        assert [arch.feature_dim for arch in archs] == projected
        assert prepared.config.algorithm["feature_dim"] == width
        assert "site_2" in prepared.notes[0]

    run(source, out=tmp_path / "run")
    again = load_config(tmp_path / "run" / "config.yaml")
    assert again.algorithm["feature_dim"] == 32
    # The same configuration, resolved in the same way.
    run(source, out=tmp_path / "run", resume=True)


def test_features_that_are_not_the_inputs_may_be_used() -> None:
    """Run linear models: with a projection, and with a method that sends no features."""
    for method, settings in (
        *((name, {"feature_dim": 8}) for name in ("fedgkt", "fedproto", "fedtgp", "fedgh")),
        ("fedgen", {}),
    ):
        source = config(method, "linear", rounds=1)
        source["algorithm"] |= settings
        assert rounds_of(source).completed == 1
