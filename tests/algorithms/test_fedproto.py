"""FedProto: a round, limit cases, prediction by nearest prototype, and the common width."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from hetero_fl.algorithms.prototypes import prototype_logits
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.core.objectives import Batch, ModelView, ModelViews, PrototypePull
from hetero_fl.core.plan import Rows
from hetero_fl.experiment import prepare, run
from hetero_fl.experiment.configuration import load_config
from tests.references.local_training import clients, largest_difference, module, train
from tests.support.federations import MIXED, config, deployed, rounds_of

FEDPROTO = {"name": "fedproto", "weight": 0.7}


@pytest.mark.usefixtures("float64")
def test_round_matches_reference() -> None:
    rounds = rounds_of(config("fedproto", MIXED, algorithm=FEDPROTO), num_rounds=1)
    before, prototypes = clients(rounds), rounds.server.state["prototypes"].clone()
    known = rounds.server.state["known"].bool()
    rounds.run_round()
    sums, counts = torch.zeros_like(prototypes), torch.zeros(10)
    for client_id, client in before.items():
        model = module(client.arch["model"], client.models["model"])

        def loss(x, y, model=model):
            z, f = model(x)
            pull = ((f - prototypes[y]) ** 2).sum(1) / f.shape[1]
            return (F.cross_entropy(z, y, reduction="none") + 0.7 * pull * known[y]).sum() / len(y)

        train(client, list(model.parameters()), loss)
        assert largest_difference(rounds.store.get(client_id).models["model"], model) < 1e-9
        data = client.data("train", None)
        with torch.no_grad():
            # Of the model after this round's training.
            features = model.eval()(data["x"]).features
        for f, y in zip(features, data["y"].tolist(), strict=True):
            sums[y] += f
            counts[y] += 1
    seen = counts > 0
    assert seen.any() and torch.equal(rounds.server.state["known"].bool(), seen | known)
    got = rounds.server.state["prototypes"][seen]
    assert torch.allclose(got, (sums / counts.clamp(min=1)[:, None])[seen], rtol=0, atol=1e-9)


@pytest.mark.usefixtures("float64")
def test_zero_prototype_weight_equals_local() -> None:
    models = [
        {**m, "feature_dim": 24} if isinstance(m, dict) else {"name": m, "feature_dim": 24}
        for m in MIXED
    ]
    local = rounds_of(config("local", models))
    free = rounds_of(config("fedproto", models, algorithm={"name": "fedproto", "weight": 0.0}))
    pulled = rounds_of(config("fedproto", models, algorithm={"name": "fedproto", "weight": 1.0}))
    for client_id in local.federation.client_infos:
        single = local.store.get(client_id).models["model"]
        assert largest_difference(free.store.get(client_id).models["model"], single) < 1e-10
        assert largest_difference(pulled.store.get(client_id).models["model"], single) > 1e-4


@pytest.mark.usefixtures("float64")
def test_missing_prototypes_add_no_loss_and_clients_can_be_stacked() -> None:
    torch.manual_seed(2)
    model = ModelSpec.from_config("mlp", 10, (1, 8, 8), options={"hidden": [12]}).build()
    g = torch.Generator().manual_seed(8)
    x, y = torch.randn(4, 1, 8, 8, generator=g), torch.tensor([0, 1, 2, 1])
    given = {
        "prototypes": torch.randn(10, 12, generator=g),
        "known": torch.tensor([1.0, 0, 1, 0, 0, 0, 0, 0, 0, 0]),
    }
    nets, objective = ModelViews(model=ModelView.from_module(model)), PrototypePull(weight=0.7)
    loss = objective.loss(nets, Batch(x=x, y=y), given)
    z, f = model(x)
    pull = (f - given["prototypes"][y]).square().sum(1) / 12 * torch.tensor([1.0, 0, 1, 0])
    assert torch.allclose(loss, F.cross_entropy(z, y, reduction="none") + 0.7 * pull, atol=1e-12)
    two = torch.vmap(lambda a, b: objective.loss(nets, Batch(x=a, y=b), given))(
        torch.stack([x, -x]), y.expand(2, 4)
    )
    assert torch.allclose(two[0], loss, atol=1e-12)


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


@pytest.mark.parametrize("home", [True, False])
def test_prediction_uses_prototype_distances(home: bool) -> None:
    rounds = rounds_of(config("fedproto", MIXED), num_rounds=0)
    (client_id, *_), rows = list(rounds.federation.client_infos), Rows("common_test")

    def read(inference: str) -> torch.Tensor:
        rounds.executor.runtime.algorithm = rounds.algorithm.model_copy(
            update={"inference": inference}
        )
        return rounds.executor.runtime.predict(deployed(rounds, client_id), rows, home)

    # Without aggregated prototypes the head predicts.
    assert torch.equal(read("prototype"), read("head"))
    rounds.run_round()
    client = clients(rounds)[client_id]
    model = module(client.arch["model"], client.models["model"]).eval()
    with torch.no_grad():
        outputs = model(client.data("common_test", None)["x"])
    state = rounds.server.state
    assert torch.allclose(read("head"), outputs.logits, atol=1e-5)
    assert torch.allclose(
        read("prototype"),
        prototype_logits(outputs.features, state["prototypes"], state["known"]),
        atol=1e-5,
    )
    own = state["known"] * (client.counts > 0) if home else state["known"]
    assert own.sum() > 0 and (client.counts == 0).any()
    assert torch.allclose(
        read("own"), prototype_logits(outputs.features, state["prototypes"], own), atol=1e-5
    )


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


def test_clients_without_shared_statistics_send_no_prototypes() -> None:
    source = config("fedproto", MIXED)
    source["clients"]["overrides"] = [{"match": "site_2", "shares": ["parameters", "predictions"]}]
    rounds, seen = rounds_of(source, num_rounds=0), {}
    receive = rounds.decode_upload
    rounds.decode_upload = lambda c, *rest: seen.setdefault(c.client_id, receive(c, *rest))  # type: ignore[method-assign]
    rounds.run_round()
    assert {c: list(p) for c, p in seen.items()} == {
        "site_1": ["features"],
        "site_2": [],
        "site_3": ["features"],
    }
    full = sum(p.nbytes for p in clients(rounds)["site_1"].models["model"].values())
    assert rounds.traffic.up < full


@pytest.mark.slow
def test_common_width_is_the_most_frequent_and_recorded(tmp_path: Path) -> None:
    models = ["cnn_bn_small", {"name": "mlp", "hidden": [24]}, {"name": "mlp", "hidden": [24, 32]}]
    prepared = prepare(config("fedproto", models, clients=3))
    archs = [client_info.arch for client_info in prepared.federation.client_infos.values()]
    assert [a.feature_width for a in archs] == [32, 32, 32] and [a.feature_dim for a in archs] == [
        None,
        32,
        None,
    ]
    assert prepared.config.algorithm["feature_dim"] == 32 and "site_2" in prepared.notes[0]
    tie = prepare(config("fedproto", models[:2], clients=2))
    assert (
        tie.config.algorithm["feature_dim"] == 32
        and tie.federation.client_infos["site_2"].arch.feature_width == 32
    )
    requests = prepare(config("fedproto", models, algorithm={"name": "fedproto", "feature_dim": 8}))
    assert {
        client_info.arch.feature_width for client_info in requests.federation.client_infos.values()
    } == {8}
    finished = run(config("fedproto", models, rounds=1), out=tmp_path / "run")
    again = load_config(tmp_path / "run" / "config.yaml")
    assert (
        again.algorithm["feature_dim"] == 32
        and prepare(again).federation.client_infos.keys() == finished.models.keys()
    )
    run(
        config("fedproto", models, rounds=1),
        out=tmp_path / "run",
        resume=True,
        # The same configuration, resolved in the same way.
    )
