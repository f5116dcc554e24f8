"""FedGKT: a round, limit cases, and the per-row items that clients send."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hetero_fl.algorithms import FedGKT
from hetero_fl.algorithms.fedgkt import LARGE
from hetero_fl.core.objectives import Supervised
from hetero_fl.core.payload import Payload
from hetero_fl.core.plan import Fit, Rows
from hetero_fl.engine.batches import index_batches
from hetero_fl.experiment import prepare
from hetero_fl.utils.errors import UserError
from tests.references.local_training import BATCH, clients, largest_difference, module
from tests.support.federations import MIXED, config, deployed, rounds_of

T = 2.5


def federation(models: Any = MIXED, clients: int = 3, **settings: Any) -> dict[str, Any]:
    own = {
        "name": "fedgkt",
        "temperature": T,
        "large_model": {"name": "mlp", "hidden": [20]},
        **settings,
    }
    return config(
        "fedgkt",
        models,
        clients,
        algorithm=own,
        server={"optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9}},
    )


def train_client(
    z: Tensor, y: Tensor, teacher: Tensor, weight: float, prior: Tensor | float = 0.0
) -> Tensor:
    p, q = (teacher / T).softmax(1), (z / T).softmax(1)
    return F.cross_entropy(z + prior, y) + weight * T**2 * (p * (p / q).log()).sum(1).mean()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("adjusted", [False, True])
def test_rounds_match_reference(adjusted: bool) -> None:
    settings = {
        "weight": 0.6,
        "server_epochs": 2,
        "server_batch_size": 50,
        "logit_adjustment": adjusted,
    }
    rounds = rounds_of(federation(**settings), num_rounds=0)
    large = module(rounds.server.arch[LARGE], rounds.server.models[LARGE])
    # The optimizer keeps its momentum.
    server = torch.optim.SGD(large.parameters(), lr=0.05, momentum=0.9)
    logits = {
        client_id: torch.zeros(client.num_rows, 10) for client_id, client in clients(rounds).items()
    }
    # No server logits exist in the first round.
    for index, weight in enumerate((0.0, 0.6)):
        before = clients(rounds)
        rounds.run_round()
        sent = []
        for client_id, client in before.items():
            model, data = (
                module(client.arch["model"], client.models["model"]),
                client.data("train", None),
            )
            prior = ((client.counts + 1) / (client.counts + 1).sum()).log() * adjusted
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
            for rows in index_batches(
                client.num_rows,
                Fit({}, Supervised(), batch_size=BATCH),
                (0, index, client_id, "train", 0),
            ):
                optimizer.zero_grad()
                train_client(
                    model(data["x"][rows]).logits,
                    data["y"][rows],
                    logits[client_id][rows],
                    weight,
                    prior,
                ).backward()
                optimizer.step()
            assert largest_difference(rounds.store.get(client_id).models["model"], model) < 1e-9
            with torch.no_grad():
                # Of the model after this round's training.
                z, h = model.eval()(data["x"])
            sent.append((h, z, data["y"], prior.expand(client.num_rows, -1)))
        h, z, y, prior = (torch.cat(column) for column in zip(*sent, strict=True))
        fit = Fit({}, Supervised(), batch_size=50, epochs=2)
        for rows in index_batches(len(y), fit, (0, index, "server", "server", 0)):
            server.zero_grad()
            train_client(
                large.train()(h[rows]).logits, y[rows], z[rows], 0.6, prior[rows]
            ).backward()
            server.step()
        assert largest_difference(rounds.server.models[LARGE], large) < 1e-9
        with torch.no_grad():
            logits = {
                client_id: large.eval()(h).logits
                for client_id, (h, *_) in zip(before, sent, strict=True)
            }
        for client_id, own in logits.items():
            assert float((rounds.server.state["logits"][client_id] - own).abs().max()) < 1e-9


@pytest.mark.usefixtures("float64")
def test_zero_distillation_weight_equals_local() -> None:
    models = [
        {**m, "feature_dim": 24} if isinstance(m, dict) else {"name": m, "feature_dim": 24}
        for m in MIXED
    ]
    local, single, distilled = (
        rounds_of(s)
        for s in (
            config("local", models),
            federation(models, weight=0.0),
            federation(models, weight=1.0),
        )
    )
    for client_id in local.federation.client_infos:
        own = local.store.get(client_id).models["model"]
        assert largest_difference(single.store.get(client_id).models["model"], own) < 1e-10
        assert largest_difference(distilled.store.get(client_id).models["model"], own) > 1e-4


@pytest.mark.parametrize("inference", ["server", "client"])
def test_server_model_predicts_from_client_features(inference: str) -> None:
    rounds = rounds_of(federation(inference=inference), num_rounds=1)
    client, site = deployed(rounds, "site_2"), rounds.executor.runtime  # type: ignore[attr-defined]
    model = module(client.arch["model"], client.models["model"]).eval()
    large = module(rounds.server.arch[LARGE], rounds.server.models[LARGE]).eval()
    with torch.no_grad():
        z, h = model(client.data("common_test", None)["x"])
        expected = large(h).logits if inference == "server" else z
    assert torch.allclose(site.predict(client, Rows("common_test"), False), expected, atol=1e-5)
    # Received for evaluation only.
    assert LARGE not in rounds.store.get("site_2").models


def test_uploads_per_row_require_permission() -> None:
    specs = FedGKT.uploads
    assert set(specs) == {"features", "logits", "labels"}
    assert all(s.private and s.rows_of == "train" and s.share == "features" for s in specs.values())
    assert any("label of every training row" in note for note in prepare(federation()).notes)
    source = federation("mlp")
    source["clients"]["overrides"] = [
        # The parts that could be shared in earlier versions.
        {"match": "site_2", "shares": ["parameters", "predictions", "statistics"]}
    ]
    rounds, seen = rounds_of(source, num_rounds=0), {}
    receive = rounds.decode_upload
    rounds.decode_upload = lambda c, *rest: seen.setdefault(c.client_id, receive(c, *rest))  # type: ignore[method-assign]
    rounds.run_round()
    assert {c: len(p) for c, p in seen.items()} == {"site_1": 3, "site_2": 0, "site_3": 3}
    assert {c: len(p["labels"]) for c, p in seen.items() if p} == {
        c: clients(rounds)[c].num_rows for c in seen if seen[c]
    }
    assert set(rounds.server.state["logits"]) == {"site_1", "site_3"}
    source["clients"]["overrides"][0]["match"] = "*"
    with pytest.raises(UserError, match="requires clients that share features"):
        prepare(source)


def test_missing_rows_are_refused() -> None:
    rounds = rounds_of(federation("mlp"), num_rounds=0)
    receive = rounds.decode_upload

    def short(client: Any, data: bytes, requests: Any, index: int) -> Payload:
        if client.client_id == "site_1":
            payload = Payload.decode(data)
            data = Payload({n: payload[n][1:] for n in payload}, payload.report).encode()
        return receive(client, data, requests, index)

    rounds.decode_upload = short  # type: ignore[method-assign]
    assert list(rounds.run_round()["failed"]) == ["site_1"]


def test_absent_client_receives_logits_of_its_last_round() -> None:
    source = federation("mlp", 4)
    source["clients"]["per_round"] = 2
    rounds = rounds_of({**source, "rounds": 5}, num_rounds=0)
    last: dict[str, Tensor] = {}
    for index in range(5):
        for client_id, client_info in rounds.federation.client_infos.items():
            items = rounds.algorithm.broadcast(rounds.server, client_info)
            assert list(items) == (["logits"] if client_id in last else [])
            assert client_id not in last or torch.equal(items["logits"], last[client_id])
        rounds.run_round()
        last.update(
            {
                client_id: rounds.server.state["logits"][client_id]
                for client_id in rounds.sample_cohort(index)
            }
        )


def test_invalid_settings_raise_one_line() -> None:
    with pytest.raises(UserError, match=r"algorithm.large_model: model lenet.*") as error:
        prepare(federation(large_model={"name": "lenet"}))
    assert "\n" not in str(error.value)


def test_deprecated_server_model_key_warns() -> None:
    with pytest.warns(
        FutureWarning, match="algorithm.server_model: deprecated; use algorithm.large_model"
    ):
        method = FedGKT.model_validate({"server_model": "linear"})

    assert method.large_model.name == "linear"
