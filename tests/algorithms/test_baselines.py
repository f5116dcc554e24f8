"""Local, Centralised and Ensemble: a round and a reading by hand, and their limits."""

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
from tests.helpers.small_federations import MIXED, config, deployed, rounds_of, same_bits
from tests.references.local_training import BATCH, apart, clients, module, train


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", ["local", "ensemble"])
def test_a_round_of_training_alone_by_hand(method: str) -> None:
    rounds = rounds_of(config(method, MIXED, 4), held=1)
    models = {}
    for id, client in clients(rounds).items():
        model = models[id] = module(client.arch["model"], client.models["model"])
        train(
            client, list(model.parameters()), lambda x, y, m=model: F.cross_entropy(m(x).logits, y)
        )
    rounds.run_round()
    for id, model in models.items():
        assert apart(rounds.store.get(id).models["model"], model) < 1e-9
        if method == "local":
            assert predicted(rounds, id, False).allclose(said(rounds, id, model), rtol=0, atol=1e-9)
    assert method == "ensemble" or (rounds.traffic.up, rounds.traffic.down) == (0, 0)


def said(rounds: SynchronousTrainer, id: str, model: torch.nn.Module) -> Tensor:
    """Logits of a model on the common test set, as that client sees it."""
    with torch.no_grad():
        return model.eval()(clients(rounds)[id].data("common_test", None)["x"]).logits


def predicted(rounds: SynchronousTrainer, id: str, home: bool) -> Tensor:
    return rounds.executor.runtime.predict(deployed(rounds, id), Rows("common_test"), home)  # type: ignore[attr-defined]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("home", [False, True])
def test_the_ensemble_is_the_mean_softmax_each_through_its_own_view(home: bool) -> None:
    source = config("ensemble", MIXED, 4)
    source["clients"]["overrides"] = [
        {"match": "site_2", "preprocess": {"normalize": {"mean": 0.3, "std": 0.2}}}
    ]
    rounds = rounds_of(source)
    members = {id: module(c.arch["model"], c.models["model"]) for id, c in clients(rounds).items()}
    p = sum(said(rounds, id, model).softmax(1) for id, model in members.items()) / 4
    assert not torch.equal(
        said(rounds, "site_2", members["site_2"]), said(rounds, "site_1", members["site_2"])
    )
    for id in members:
        assert predicted(rounds, id, home).softmax(1).allclose(p, rtol=0, atol=1e-9)


@pytest.mark.usefixtures("float64")
def test_who_was_not_in_the_cohort_stays_in_the_ensemble_as_it_last_was() -> None:
    rounds = rounds_of(config("ensemble", MIXED, 4, clients__per_round=2, rounds=4))
    here = {id for index in range(4) for id in rounds.sample_cohort(index)}
    assert here - set(rounds.sample_cohort(3)) and set(rounds.server.state["members"]) == here
    for id in here:
        assert same_bits(
            rounds.server.state["members"][id],
            floating_tensors(rounds.store.get(id).models["model"]),
        )


@pytest.mark.usefixtures("float64")
def test_an_ensemble_of_one_is_local() -> None:
    local, ensemble = (rounds_of(config(m, clients=1)) for m in ("local", "ensemble"))
    one, other = (predicted(rounds, "site", False).softmax(1) for rounds in (local, ensemble))
    assert torch.allclose(one, other, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("float64")
def test_the_ensembles_word_on_labels_is_the_mean_probability_of_each() -> None:
    draws = torch.Generator().manual_seed(3)
    x = torch.randn(240, 4, generator=draws)
    y = (x @ torch.randn(4, 3, generator=draws) > 0).double()
    source = config("ensemble", [{"name": "mlp", "hidden": [width]} for width in (12, 9, 12)], 3)
    rounds = prepare(
        {**source, "data": {"proxy": {"size": 40}}}, dataset=from_arrays(x, y)
    ).make_trainer()
    rounds.run_round()
    members = {id: module(c.arch["model"], c.models["model"]) for id, c in clients(rounds).items()}
    p = sum(said(rounds, id, model).sigmoid() for id, model in members.items()) / 3
    assert rounds.federation.task.kind == "multilabel"
    for home in (False, True):
        assert predicted(rounds, "site_1", home).sigmoid().allclose(p, rtol=0, atol=1e-9)


@pytest.mark.usefixtures("float64")
def test_two_rounds_of_centralised_training_by_hand() -> None:
    cnn, mlp, _ = MIXED
    source = config("centralized", [cnn, mlp, mlp], 3, clients__defaults__epochs=2)
    source["clients"]["defaults"]["optimizer"].update(schedule="linear", gamma=0.4)
    views = {"site_1": (0.1, 0.5), "site_2": (0.3, 0.2), "site_3": (0.3, 0.2)}
    source["clients"]["overrides"] = [
        {"match": id, "preprocess": {"normalize": {"mean": mean, "std": std}}}
        for id, (mean, std) in views.items()
    ]
    rounds = rounds_of(source, held=0)
    sites = clients(rounds)
    arch = sites["site_2"].arch["model"]  # the most frequent, and all rows through its view
    seen = {id: client.data("train", None) for id, client in sites.items()}
    x = torch.cat([((seen[id]["x"] * std + mean) - 0.3) / 0.2 for id, (mean, std) in views.items()])
    y = torch.cat([columns["y"] for columns in seen.values()])
    model = module(arch, rounds.federation.initial_tensors(arch))
    for index, lr in enumerate((0.05, 0.02)):
        rounds.run_round()
        sgd = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
        fit = Fit({}, Supervised(), epochs=2, batch_size=BATCH)
        for rows in index_batches(
            len(y), fit, (rounds.federation.seed, index, "site_1", "train", 0)
        ):
            sgd.zero_grad()
            F.cross_entropy(model(x[rows]).logits, y[rows]).backward()
            sgd.step()
        assert apart(rounds.server.models[arch.spec_id], model) < 1e-9
    for id in sites:
        for home in (False, True):
            assert predicted(rounds, id, home).allclose(
                said(rounds, "site_2", model), rtol=0, atol=1e-9
            )
    assert rounds.server.models.keys() - {arch.spec_id}
    assert (rounds.traffic.up, rounds.traffic.down) == (0, 0)
