"""Local, Centralized and Ensemble: rounds and predictions compared with references."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hetero_fl.core.participant import floating_tensors
from hetero_fl.core.plan import Rows
from hetero_fl.data import from_arrays
from hetero_fl.experiment import prepare
from hetero_fl.federation.trainer import FederatedTrainer
from tests.references.local_training import clients, module
from tests.support.federations import MIXED, config, deployed, rounds_of, same_bits


def logits_of(rounds: FederatedTrainer, client_id: str, model: torch.nn.Module) -> Tensor:
    """Return the logits of a model on the global test set, preprocessed as for that client."""
    with torch.no_grad():
        return model.eval()(clients(rounds)[client_id].data("common_test", None)["x"])


def predicted(rounds: FederatedTrainer, client_id: str, home: bool) -> Tensor:
    return rounds.executor.runtime.predict(deployed(rounds, client_id), Rows("common_test"), home)  # type: ignore[attr-defined]


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
