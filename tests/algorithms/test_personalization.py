"""FedBN, FedRep, FedBABU and Ditto: personal tensors and the models that are evaluated."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hetero_fl.algorithms.personalization import PERSONAL
from hetero_fl.core.participant import floating_tensors
from hetero_fl.core.plan import Rows
from hetero_fl.core.saved_model import SavedModel
from tests.references.local_training import clients, largest_difference, module
from tests.support.federations import MIXED, config, deployed, rounds_of, same_bits

BN, MLP, GN = MIXED


def test_server_has_a_model_if_all_clients_share_it() -> None:
    """Check that a model without BatchNorm statistics is not evaluated."""
    for method, model, is_evaluated in (
        ("fedbn", GN, True),
        ("fedbn", BN, False),
        ("fedbabu", MLP, True),
        ("fedbabu", MIXED, False),
    ):
        rounds = rounds_of(config(method, model, 4), num_rounds=1)
        assert (rounds.evaluate().server is not None) is is_evaluated, (method, model)


@pytest.mark.usefixtures("float64")
def test_model_without_backbone_trains_its_head() -> None:
    full = {"clients__defaults__batch_size": 500}
    local = rounds_of(config("local", ["linear", MLP], 4, **full))
    info = local.federation.client_infos["site_1"]
    for method, expected in (
        ("fedrep", local.store.get("site_1").models["model"]),
        ("fedbabu", local.federation.initial_tensors(info.arch)),
    ):
        actual = rounds_of(config(method, ["linear", MLP], 4, **full))
        assert largest_difference(clients(actual)["site_1"].models["model"], expected) < 1e-12
        assert actual.evaluate().clients["site_1"].scores["personal"]


def test_ditto_uses_personal_model_for_local_test(tmp_path: Path) -> None:
    rounds = rounds_of(config("ditto", "mlp", 3, clients__per_round=1, rounds=1))
    (trained,) = rounds.sample_cohort(0)
    rows = Rows("common_test")
    for client_id in rounds.federation.client_infos:
        client = deployed(rounds, client_id)
        site = rounds.executor.runtime  # type: ignore[attr-defined]
        home, common = site.predict(client, rows, True), site.predict(client, rows, False)
        assert torch.equal(home, common) is (client_id != trained)
        personal = module(client.arch["model"], client.models[PERSONAL]).eval()
        with torch.no_grad():
            assert torch.allclose(home, personal(client.data("common_test", None)["x"]), atol=1e-5)
        (shared,) = rounds.server.models.values()
        assert same_bits(client.models["model"], shared)
    path = tmp_path / "model.safetensors"
    path.write_bytes(rounds.evaluate(details=True).clients[trained].model)
    assert same_bits(
        SavedModel.load(path).tensors, floating_tensors(rounds.store.get(trained).models[PERSONAL])
    )
