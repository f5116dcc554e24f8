"""Local, Centralized and Ensemble: rounds and predictions compared with references."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hetero_fl.core.objectives import Supervised
from hetero_fl.core.participant import floating_tensors
from hetero_fl.core.plan import Fit, Rows
from hetero_fl.data import from_arrays
from hetero_fl.engine.batches import index_batches
from hetero_fl.experiment import prepare
from hetero_fl.federation.synchronous import SynchronousTrainer
from tests.references.local_training import BATCH, clients, largest_difference, module, train
from tests.support.federations import MIXED, config, deployed, rounds_of, same_bits


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", ["local", "ensemble"])
def test_local_round_matches_reference(method: str) -> None:
    rounds = rounds_of(config(method, MIXED, 4), num_rounds=1)
    models = {}
    for client_id, client in clients(rounds).items():
        model = models[client_id] = module(client.arch["model"], client.models["model"])
        train(
            client, list(model.parameters()), lambda x, y, m=model: F.cross_entropy(m(x).logits, y)
        )
    rounds.run_round()
    for client_id, model in models.items():
        assert largest_difference(rounds.store.get(client_id).models["model"], model) < 1e-9
        if method == "local":
            assert predicted(rounds, client_id, False).allclose(
                logits_of(rounds, client_id, model), rtol=0, atol=1e-9
            )
    assert method == "ensemble" or (rounds.traffic.up, rounds.traffic.down) == (0, 0)


def logits_of(rounds: SynchronousTrainer, client_id: str, model: torch.nn.Module) -> Tensor:
    """Return the logits of a model on the global test set, preprocessed as for that client."""
    with torch.no_grad():
        return model.eval()(clients(rounds)[client_id].data("common_test", None)["x"]).logits


def predicted(rounds: SynchronousTrainer, client_id: str, home: bool) -> Tensor:
    return rounds.executor.runtime.predict(deployed(rounds, client_id), Rows("common_test"), home)  # type: ignore[attr-defined]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("home", [False, True])
def test_ensemble_averages_softmax_of_client_views(home: bool) -> None:
    source = config("ensemble", MIXED, 4)
    source["clients"]["overrides"] = [
        {"match": "site_2", "preprocess": {"normalize": {"mean": 0.3, "std": 0.2}}}
    ]
    rounds = rounds_of(source)
    members = {
        client_id: module(c.arch["model"], c.models["model"])
        for client_id, c in clients(rounds).items()
    }
    p = (
        sum(logits_of(rounds, client_id, model).softmax(1) for client_id, model in members.items())
        / 4
    )
    assert not torch.equal(
        logits_of(rounds, "site_2", members["site_2"]),
        logits_of(rounds, "site_1", members["site_2"]),
    )
    for client_id in members:
        assert predicted(rounds, client_id, home).softmax(1).allclose(p, rtol=0, atol=1e-9)


@pytest.mark.usefixtures("float64")
def test_ensemble_keeps_last_models_of_absent_clients() -> None:
    rounds = rounds_of(config("ensemble", MIXED, 4, clients__per_round=2, rounds=4))
    sampled = {client_id for index in range(4) for client_id in rounds.sample_cohort(index)}
    assert sampled - set(rounds.sample_cohort(3)) and set(rounds.server.state["members"]) == sampled
    for client_id in sampled:
        assert same_bits(
            rounds.server.state["members"][client_id],
            floating_tensors(rounds.store.get(client_id).models["model"]),
        )


@pytest.mark.usefixtures("float64")
def test_ensemble_of_one_client_equals_local() -> None:
    local, ensemble = (rounds_of(config(m, clients=1)) for m in ("local", "ensemble"))
    one, other = (predicted(rounds, "site", False).softmax(1) for rounds in (local, ensemble))
    assert torch.allclose(one, other, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("float64")
def test_multilabel_ensemble_averages_probabilities() -> None:
    draws = torch.Generator().manual_seed(3)
    x = torch.randn(240, 4, generator=draws)
    y = (x @ torch.randn(4, 3, generator=draws) > 0).double()
    source = config("ensemble", [{"name": "mlp", "hidden": [width]} for width in (12, 9, 12)], 3)
    rounds = prepare(
        {**source, "data": {"proxy": {"size": 40}}}, dataset=from_arrays(x, y)
    ).make_trainer()
    rounds.run_round()
    members = {
        client_id: module(c.arch["model"], c.models["model"])
        for client_id, c in clients(rounds).items()
    }
    p = (
        sum(logits_of(rounds, client_id, model).sigmoid() for client_id, model in members.items())
        / 3
    )
    assert rounds.federation.task.kind == "multilabel"
    for home in (False, True):
        assert predicted(rounds, "site_1", home).sigmoid().allclose(p, rtol=0, atol=1e-9)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("each", [False, True])
def test_centralized_rounds_match_reference(each: bool) -> None:
    cnn, mlp, _ = MIXED
    source = config("centralized", [cnn, mlp, mlp], 3, clients__defaults__epochs=2)
    source["algorithm"]["each_architecture"] = each
    source["clients"]["defaults"]["optimizer"].update(schedule="linear", gamma=0.4)
    views = {"site_1": (0.1, 0.5), "site_2": (0.3, 0.2), "site_3": (0.6, 0.4)}
    source["clients"]["overrides"] = [
        {"match": client_id, "preprocess": {"normalize": {"mean": mean, "std": std}}}
        for client_id, (mean, std) in views.items()
    ]
    rounds = rounds_of(source, num_rounds=0)
    sites = clients(rounds)
    # The client whose model and preprocessing are used, and the name of the random stream. A single
    # model is that of the most frequent architecture.
    pooled = {"site_1": "site_1", "site_2": "site_2"} if each else {"site_2": "site_1"}
    inputs, models = {}, {}
    labels = torch.cat([client.data("train", None)["y"] for client in sites.values()])
    for reference in pooled:
        mean, std = views[reference]
        inputs[reference] = torch.cat(
            [
                (client.data("train", None)["x"] * views[name][1] + views[name][0] - mean) / std
                for name, client in sites.items()
            ]
        )
        arch = sites[reference].arch["model"]
        models[reference] = module(arch, rounds.federation.initial_tensors(arch))
    for index, lr in enumerate((0.05, 0.02)):
        rounds.run_round()
        for place, (reference, stream) in enumerate(pooled.items()):
            model, x = models[reference], inputs[reference]
            sgd = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
            fit = Fit({}, Supervised(), epochs=2, batch_size=BATCH)
            for rows in index_batches(
                len(labels), fit, (rounds.federation.seed, index, stream, "train", place)
            ):
                sgd.zero_grad()
                F.cross_entropy(model(x[rows]).logits, labels[rows]).backward()
                sgd.step()
            arch = sites[reference].arch["model"]
            assert largest_difference(rounds.server.models[arch.spec_id], model) < 1e-9
    for client_id in sites:
        reference = "site_1" if each and client_id == "site_1" else "site_2"
        for home in (False, True):
            assert predicted(rounds, client_id, home).allclose(
                logits_of(rounds, reference, models[reference]), rtol=0, atol=1e-9
            )
    assert rounds.server.models.keys() - {arch.spec_id}
    assert (rounds.traffic.up, rounds.traffic.down) == (0, 0)
